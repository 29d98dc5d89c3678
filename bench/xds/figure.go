package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"
)

// figure is one thing that was measured.
type figure struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	Roost  float64 `json:"roost"`
	Peer   float64 `json:"peer,omitempty"`
	Ratio  float64 `json:"ratio,omitempty"`  // of Roost to the peer, or as the name says
	Target float64 `json:"target,omitempty"` // the ratio, or where there is none Roost's, is at most this; 0: none
	Met    bool    `json:"met"`
}

// ratio is a figure of both sides, or of one in two cases: the target is for the
// first in terms of the second.
func ratio(name, unit string, value, of, target float64) figure {
	f := figure{Name: name, Unit: unit, Roost: value, Peer: of, Target: target}
	if of > 0 {
		f.Ratio = value / of
	}
	f.Met = target == 0 || of > 0 && f.Ratio <= target
	return f
}

// alone is a figure of Roost's only.
func alone(name, unit string, value, target float64) figure {
	return figure{Name: name, Unit: unit, Roost: value, Target: target, Met: target == 0 || value <= target}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func show(o options, all []figure, out io.Writer) error {
	if o.output == "json" {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			Cores   int      `json:"cores"`
			Figures []figure `json:"figures"`
		}{runtime.NumCPU(), all})
	}
	_, err := fmt.Fprintf(out, "%d cores\n\n%-54s %14s %14s %9s %12s\n", runtime.NumCPU(), "", "Roost", "peer", "ratio", "at most")
	for _, f := range all {
		peer, of, target := "", "", ""
		if f.Peer > 0 {
			peer, of = number(f.Peer)+" "+f.Unit, fmt.Sprintf("%.4f", f.Ratio)
		}
		switch {
		case f.Target == 0:
		case f.Peer > 0:
			target = fmt.Sprintf("%.4f", f.Target)
		default:
			target = number(f.Target) + " " + f.Unit
		}
		if f.Target > 0 {
			target += map[bool]string{true: "  met", false: "  MISSED"}[f.Met]
		}
		_, werr := fmt.Fprintf(out, "%-54s %14s %14s %9s %12s\n", f.Name, number(f.Roost)+" "+f.Unit, peer, of, target)
		err = errors.Join(err, werr)
	}
	return err
}

// number has three digits that mean something, or all before the point.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}
