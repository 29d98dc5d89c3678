// Command ledger measures what an address costs with a real `roost run` on
// loopback: how soon that of a new service can be dialled through a real Envoy
// and resolved, how long ten thousand services take to create and a restart with
// them, and how long a drain takes that every proxy has to confirm.
//
//	make bench-ledger
//	go run ./bench/ledger -parts dial,drain -o json
//
// It needs bin/roost, a real Envoy (fetched as for the tests) and 127.0.0.0/8.
// The bench and what it measures share the machine's cores. It exits 1 when a
// figure misses its target.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"time"
)

type options struct {
	roost    string
	output   string
	parts    string
	services int
	many     int
	clients  int
	proxies  int
	drains   int
}

func main() {
	var o options
	flag.StringVar(&o.roost, "roost", "bin/roost", "the roost binary")
	flag.StringVar(&o.output, "o", "table", "table or json")
	flag.StringVar(&o.parts, "parts", "dial,create,drain", "what to measure")
	flag.IntVar(&o.services, "services", 200, "dial: services, one after the other")
	flag.IntVar(&o.many, "many", 10_000, "create: services in all")
	flag.IntVar(&o.clients, "clients", 32, "create: clients at once")
	flag.IntVar(&o.proxies, "proxies", 200, "drain: connected proxies")
	flag.IntVar(&o.drains, "drains", 50, "drain: drains, one after the other")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	met, err := run(ctx, o, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "ledger:", err)
	}
	if err != nil || !met {
		os.Exit(1)
	}
}

// figure is one thing that was measured.
type figure struct {
	Name   string  `json:"name"`
	Value  float64 `json:"value"`
	Unit   string  `json:"unit"`
	Target float64 `json:"target,omitempty"` // at most this; 0: none
	Met    bool    `json:"met"`
}

func newFigure(name string, value float64, unit string, target float64) figure {
	return figure{name, value, unit, target, target == 0 || value <= target}
}

// quantiles are the figures of a list of durations; target is that of the 99th
// percentile.
func quantiles(name string, list []time.Duration, target time.Duration) []figure {
	sorted := slices.Sorted(slices.Values(list))
	at := func(q float64) float64 {
		return milliseconds(sorted[min(int(q*float64(len(sorted))), len(sorted)-1)])
	}
	return []figure{newFigure(name+" p50", at(0.5), "ms", 0), newFigure(name+" p99", at(0.99), "ms", milliseconds(target))}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

var parts = map[string]func(context.Context, options) ([]figure, error){"dial": dial, "create": create, "drain": drain}

func run(ctx context.Context, o options, out io.Writer) (met bool, err error) {
	met = true
	var all []figure
	for _, name := range strings.Split(o.parts, ",") {
		part := parts[name]
		if part == nil {
			return false, fmt.Errorf("-parts: there is no %q", name)
		}
		figures, err := part(ctx, o)
		if err != nil {
			return false, fmt.Errorf("%s: %w", name, err)
		}
		for _, f := range figures {
			met = met && f.Met
		}
		all = append(all, figures...)
	}
	return met, errors.Join(err, show(o, all, out))
}

func show(o options, all []figure, out io.Writer) error {
	if o.output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			Cores   int      `json:"cores"`
			Figures []figure `json:"figures"`
		}{runtime.NumCPU(), all})
	}
	_, err := fmt.Fprintf(out, "%d cores\n\n%-56s %12s %12s\n", runtime.NumCPU(), "", "measured", "at most")
	for _, f := range all {
		target := ""
		if f.Target > 0 {
			target = fmt.Sprintf("%.0f %s", f.Target, f.Unit)
		}
		if !f.Met {
			target += "  missed"
		}
		_, werr := fmt.Fprintf(out, "%-56s %12s %12s\n", f.Name, fmt.Sprintf("%.1f %s", f.Value, f.Unit), target)
		err = errors.Join(err, werr)
	}
	return err
}
