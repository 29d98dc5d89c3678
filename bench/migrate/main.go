// Command migrate measures how long a migrated instance takes to answer through
// its service's stable address, beside a peer in the same run: a bare Consul
// watch that feeds go-control-plane's LinearCache, the least that a control
// plane can be. Then it moves and kills instances under load and counts failed
// requests.
//
//	make bench-migrate
//	go run ./bench/migrate -moves 200 -others 1000
//
// It needs bin/roost, a real Envoy and a real Consul (fetched or built as for
// the tests), and 127.0.0.0/8.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/cmd/binaries"
)

type options struct {
	roost    string
	moves    int
	others   int
	watched  int
	requests int
	rate     int
}

func main() {
	var o options
	flag.StringVar(&o.roost, "roost", "bin/roost", "the roost binary")
	flag.IntVar(&o.moves, "moves", 100, "moves of each side")
	flag.IntVar(&o.others, "others", 0, "other services in the catalog, none of Roost's business")
	flag.IntVar(&o.watched, "watched", 0, "further services that Roost watches, too")
	flag.IntVar(&o.requests, "requests", 100_000, "requests during planned moves; 0 leaves the load out")
	flag.IntVar(&o.rate, "rate", 2000, "requests a second during planned moves")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "migrate:", err)
		os.Exit(1)
	}
}

// instances is how many a service has while one of them moves.
const instances = 3

func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "roost-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &bench{dir: dir, options: o}
	defer b.close()
	if err := b.open(ctx); err != nil {
		return err
	}
	floor, err := newSide(b, "floor", b.floorAddress, nil)
	if err != nil {
		return err
	}
	defer floor.close()
	roost, err := newSide(b, "shop", "", map[string]string{"roost-tenant": "acme", "roost-port": "18080", "roost-protocol": "http"})
	if err != nil {
		return err
	}
	defer roost.close()
	if roost.address, err = b.roostAddress(ctx, "acme", "shop"); err != nil {
		return err
	}
	for _, s := range []*side{floor, roost} {
		if err := s.ready(ctx); err != nil {
			return fmt.Errorf("%s at %s: %w", s.name, s.address, err)
		}
	}
	fmt.Printf("%d moves of each side in turn, %d instances, %d other services, %d more that Roost watches, %d cores\n", o.moves, instances, o.others, o.watched, cores())
	before := b.cpu()
	for range o.moves {
		for _, s := range []*side{floor, roost} {
			if err := s.move(ctx, true); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	cpu := (b.cpu() - before) / time.Duration(o.moves)
	fmt.Printf("\n%-28s %9s %9s %9s\n", "PUT to first answer", "p50", "p99", "max")
	for _, s := range []*side{floor, roost} {
		fmt.Printf("%-28s %6.1f ms %6.1f ms %6.1f ms\n", s.label(), ms(s.took, 0.5), ms(s.took, 0.99), ms(s.took, 1))
	}
	fmt.Printf("%-28s %9.2f %9.2f\n", "roost / floor", ms(roost.took, 0.5)/ms(floor.took, 0.5), ms(roost.took, 0.99)/ms(floor.took, 0.99))
	fmt.Printf("%-28s %6.1f ms\n", "roost CPU time a move", float64(cpu.Microseconds())/1000)
	if o.requests == 0 {
		return nil
	}
	return underLoad(ctx, o, roost)
}

// ms is a quantile in milliseconds.
func ms(list []time.Duration, q float64) float64 {
	sorted := slices.Sorted(slices.Values(list))
	i := min(int(q*float64(len(sorted))), len(sorted)-1)
	return float64(sorted[i].Microseconds()) / 1000
}

// bench is everything that both sides share.
type bench struct {
	options
	dir       string
	consul    *binaries.Process
	roost     *binaries.Process
	processes []*binaries.Process
	client    *api.Client
	admin     string

	floorAddress string
	floorStop    func()
}

func (b *bench) open(ctx context.Context) error {
	consul, err := binaries.FindConsul(ctx, binaries.ConsulOptions{Talk: os.Stderr})
	if err != nil {
		return err
	}
	envoy, err := binaries.FindEnvoy(ctx, binaries.EnvoyOptions{Talk: os.Stderr})
	if err != nil {
		return err
	}
	if err := b.startConsul(ctx, consul.Path); err != nil {
		return err
	}
	for i := range b.others + b.watched {
		r := &api.AgentServiceRegistration{ID: fmt.Sprintf("other-%d", i), Name: fmt.Sprintf("other-%d", i), Address: "127.0.0.99", Port: 9999}
		if i >= b.others {
			r.Meta = map[string]string{"roost-tenant": "others", "roost-port": "19999", "roost-protocol": "http"}
		}
		if err := b.client.Agent().ServiceRegister(r); err != nil {
			return fmt.Errorf("register other service %d: %w", i, err)
		}
	}
	if err := b.startFloor(ctx, envoy.Path); err != nil {
		return err
	}
	return b.startRoost(ctx, envoy.Path)
}

func (b *bench) close() {
	for _, p := range slices.Backward(b.processes) {
		p.Stop(3 * time.Second)
	}
	if b.roost != nil {
		// What roost run has put into the kernel, where it may, outlives it.
		_ = exec.Command(b.options.roost, "capture", "remove", "--config", filepath.Join(b.dir, "roost.yaml")).Run()
	}
	if b.floorStop != nil {
		b.floorStop()
	}
}

// cpu is what the roost process has used.
func (b *bench) cpu() time.Duration { return cpuOf(b.roost.Pid()) }

func (b *bench) log(name string) (*os.File, error) {
	return os.Create(filepath.Join(b.dir, name+".log"))
}

// pollEvery is how often a side is asked whether it answers yet.
const pollEvery = 5 * time.Millisecond

func until(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return binaries.Poll(ctx, pollEvery, f)
}

func get(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, res.Status)
	}
	return nil
}
