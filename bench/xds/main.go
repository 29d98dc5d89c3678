// Command xds measures what it costs to serve delta ADS, beside a peer in the
// same run: go-control-plane's LinearCache and MuxCache behind its delta server.
// Both run in processes of their own and serve the same clusters and endpoints to
// the same simulated proxies, which hold one connection and one stream each,
// subscribe as Envoy does and ACK at once.
//
//	make bench-xds
//	go run ./bench/xds -parts change -sizes 2000x100 -o json
//
// Roost's side takes each change the whole way from a catalog through lb.Build
// and envoy.Translate to Publish; the peer, which has no such way, is handed the
// finished ClusterLoadAssignment. The parts:
//
//   - change, for PROXIESxHELD: all proxies connect at once (cold); one endpoint
//     moves, again and again (change); all connections break and come back with
//     what they hold, and a change that is made when every proxy has asked has to
//     reach each (reconnect; its bytes are those beyond a change's).
//   - pipeline, Roost alone: ten thousand services in forty tenants.
//   - allocs: heap objects for each response sent, its ACK included.
//
// Where there are two sides they take turns, and a figure is the median of its
// rounds. The bench and what it measures share the machine's cores. It exits 1
// when a figure misses its target.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"
)

type options struct {
	output  string
	parts   string
	sizes   string
	each    int
	rounds  int
	changes int
	budget  time.Duration
	quick   bool

	services int
	tenants  int
	proxies  int
	rate     int
	load     time.Duration

	profiles string
	serve    string
}

func main() {
	var o options
	flag.StringVar(&o.output, "o", "table", "table or json")
	flag.StringVar(&o.parts, "parts", "change,pipeline,flapping,allocs", "what to measure")
	flag.StringVar(&o.sizes, "sizes", "2000x10,2000x100,2000x1000,200x10000", "change: proxies and the services that each holds")
	flag.IntVar(&o.each, "each", 3, "change, allocs: endpoints of each service")
	flag.IntVar(&o.rounds, "rounds", 2, "change: rounds of each side; one where proxies x services pass 500,000")
	flag.IntVar(&o.changes, "changes", 31, "change: changes of each round, fewer where they take longer than -budget")
	flag.DurationVar(&o.budget, "budget", 30*time.Second, "change: time for the changes of a round; five are made in any case")
	flag.BoolVar(&o.quick, "quick", false, "everything small: does it work at all?")
	flag.IntVar(&o.services, "services", 10_000, "pipeline: services")
	flag.IntVar(&o.tenants, "tenants", 40, "pipeline: tenants")
	flag.IntVar(&o.proxies, "proxies", 800, "pipeline: proxies")
	flag.IntVar(&o.rate, "rate", 500, "pipeline: changes a second")
	flag.DurationVar(&o.load, "load", 10*time.Second, "pipeline: how long they come")
	flag.StringVar(&o.profiles, "cpuprofile", "", "a directory for CPU and heap profiles of the servers")
	flag.StringVar(&o.serve, "serve", "", "be a server: roost or peer; the bench starts itself so")
	flag.Parse()
	if o.serve != "" {
		if err := serve(o.serve, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "xds:", o.serve+":", err)
			os.Exit(1)
		}
		return
	}
	if o.quick {
		o = o.small()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	met, err := run(ctx, o, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "xds:", err)
	}
	if err != nil || !met {
		os.Exit(1)
	}
}

// small is a run of a few seconds, whose figures mean nothing.
func (o options) small() options {
	o.quick, o.sizes, o.rounds, o.changes = true, "20x10", 1, 3
	o.services, o.tenants, o.proxies, o.rate, o.load = 40, 4, 8, 50, time.Second
	return o
}

// stepTimeout bounds one step of a part: a cold start, a change, a reconnect.
const stepTimeout = 5 * time.Minute

var parts = map[string]func(context.Context, options) ([]figure, error){"change": change, "pipeline": pipeline, "allocs": allocs, "flapping": flapping}

func run(ctx context.Context, o options, out io.Writer) (met bool, err error) {
	met = true
	var all []figure
	for name := range strings.SplitSeq(o.parts, ",") {
		part := parts[name]
		if part == nil {
			return false, fmt.Errorf("-parts: there is no %q", name)
		}
		figures, perr := part(ctx, o)
		for _, f := range figures {
			met = met && f.Met
		}
		all = append(all, figures...)
		if perr != nil {
			err = fmt.Errorf("%s: %w", name, perr)
			break
		}
	}
	return met, errors.Join(err, show(o, all, out))
}
