package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// command is a line that a server's process is told.
type command struct {
	Do string `json:"do"` // start change usage memory load profile heap
	size
	At      string        `json:"at,omitempty"`      // start: where to listen; a free port of 127.0.0.1
	Service int           `json:"service,omitempty"` // change
	Rate    int           `json:"rate,omitempty"`    // load: changes a second
	For     time.Duration `json:"for,omitempty"`     // load
	File    string        `json:"file,omitempty"`    // profile, heap; profile without one ends it
}

// answer is the line that it answers.
type answer struct {
	Error   string        `json:"error,omitempty"`
	Address string        `json:"address,omitempty"` // start
	Built   time.Duration `json:"built,omitempty"`   // start: the first build, until it is published
	Held    int           `json:"held,omitempty"`    // start: clusters of each proxy of the first tenant
	Name    string        `json:"name,omitempty"`    // change: whose endpoints
	At      int64         `json:"at,omitempty"`      // change: when it was handed in, in Unix nanoseconds
	CPU     time.Duration `json:"cpu,omitempty"`     // usage
	Mallocs uint64        `json:"mallocs,omitempty"` // memory: heap objects so far
	RSS     int64         `json:"rss,omitempty"`     // memory: bytes
	Stacks  int64         `json:"stacks,omitempty"`  // memory: those of goroutines, in RSS
	Landed  []landed      `json:"landed,omitempty"`  // load
}

// landed is a change of a load, and the version in which it was published.
type landed struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	At      int64  `json:"at"`
}

// server is one of the two that are measured.
type server interface {
	// start serves on a listener until ctx ends.
	start(ctx context.Context, s size, l net.Listener) (answer, error)
	// change moves one endpoint of a service.
	change(service int) (answer, error)
	// load moves endpoints at a rate for a time.
	load(rate int, d time.Duration) ([]landed, error)
	// wait returns when everything that start has started has ended, and why it
	// has where ctx was not the reason.
	wait() error
}

// serve is a server's process: it does what it is told until there are no more
// commands.
func serve(kind string, in io.Reader, out io.Writer) (err error) {
	var s server
	switch kind {
	case sideRoost:
		s = &roost{}
	case sidePeer:
		s = &peer{}
	default:
		return fmt.Errorf("-serve: there is no %q", kind)
	}
	ctx, stop := context.WithCancel(context.Background())
	defer func() {
		stop()
		err = errors.Join(err, s.wait())
	}()
	p := &process{server: s}
	commands, answers := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var c command
		if err := commands.Decode(&c); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		a, err := p.do(ctx, c)
		if err != nil {
			a.Error = err.Error()
		}
		if err := answers.Encode(a); err != nil {
			return err
		}
	}
}

type process struct {
	server
	profile *os.File
}

func (p *process) do(ctx context.Context, c command) (answer, error) {
	switch c.Do {
	case "start":
		l, err := net.Listen("tcp", cmp.Or(c.At, "127.0.0.1:0"))
		if err != nil {
			return answer{}, err
		}
		a, err := p.start(ctx, c.size, l)
		a.Address = l.Addr().String()
		return a, err
	case "change":
		return p.change(c.Service)
	case "load":
		list, err := p.load(c.Rate, c.For)
		return answer{Landed: list}, err
	case "usage":
		cpu, err := cpuTime()
		return answer{CPU: cpu}, err
	case "memory":
		return memory()
	case "profile":
		return answer{}, p.cpuProfile(c.File)
	case "heap":
		return answer{}, heapProfile(c.File)
	}
	return answer{}, fmt.Errorf("there is no command %q", c.Do)
}

// cpuTime is what this process has used, user and system.
func cpuTime() (time.Duration, error) {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0, err
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}

// memory collects garbage, gives what is free back, and looks at what is left.
func memory() (answer, error) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	runtime.GC()
	debug.FreeOSMemory()
	mallocs := m.Mallocs
	runtime.ReadMemStats(&m)
	rss, err := residentSet()
	return answer{Mallocs: mallocs, RSS: rss, Stacks: int64(m.StackInuse)}, err
}

func residentSet() (int64, error) {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(data) {
		if rest, ok := bytes.CutPrefix(line, []byte("VmRSS:")); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(string(rest)), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("/proc/self/status has no VmRSS")
}

func (p *process) cpuProfile(file string) (err error) {
	if file == "" {
		pprof.StopCPUProfile()
		return p.profile.Close()
	}
	if p.profile, err = os.Create(file); err != nil {
		return err
	}
	return pprof.StartCPUProfile(p.profile)
}

func heapProfile(file string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(pprof.WriteHeapProfile(f), f.Close())
}
