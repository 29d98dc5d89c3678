package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// what a round waits for of each proxy.
type what uint8

const (
	filled  what = iota // it has every cluster and all endpoints, and has ACKed them
	written             // its first requests have left
	changed             // it got another version of one name's endpoints
)

// round counts the proxies that something has happened to.
type round struct {
	what what
	name uint32
	left atomic.Int64
	done chan struct{}
}

// fleet is the proxies of one server.
type fleet struct {
	address  string
	want     int // clusters, and as many endpoints, that each gets
	names    *words
	versions *words
	proxies  []*proxy
	records  atomic.Bool
	received atomic.Int64 // bytes, by all of them
	round    atomic.Pointer[round]

	failed chan struct{} // closed by the first failure
	once   sync.Once
	err    error // why; read after failed
}

// newFleet makes proxies: each tenant has as many.
func newFleet(address string, want, proxies, tenants int) *fleet {
	f := &fleet{address: address, want: want, names: newWords(), versions: newWords(), failed: make(chan struct{})}
	for i := range proxies {
		f.proxies = append(f.proxies, &proxy{fleet: f, id: fmt.Sprintf("sidecar~%s~%s~p%d", tenantName(i%tenants), serviceName(i%tenants), i)})
	}
	return f
}

func (f *fleet) fail(err error) {
	f.once.Do(func() {
		f.err = err
		close(f.failed)
	})
}

// expect begins a round of n proxies.
func (f *fleet) expect(w what, name uint32, n int) *round {
	r := &round{what: w, name: name, done: make(chan struct{})}
	r.left.Store(int64(n))
	f.round.Store(r)
	return r
}

// counts counts a proxy once in the present round, where it is one of those
// that matter. It runs on the proxy's goroutine.
func (f *fleet) counts(p *proxy, matters func(*round) bool) {
	r := f.round.Load()
	if r == nil || p.seen == r || !matters(r) {
		return
	}
	p.seen, p.at = r, time.Now().UnixNano()
	if r.left.Add(-1) == 0 {
		close(r.done)
	}
}

func (f *fleet) wait(ctx context.Context, r *round) error {
	select {
	case <-r.done:
		return nil
	case <-f.failed:
		return f.err
	case <-ctx.Done():
		return fmt.Errorf("%d proxies are still waited for: %w", r.left.Load(), context.Cause(ctx))
	}
}

// requests are what each proxy's next stream begins with.
func (f *fleet) requests() [][2][]byte {
	memo := map[string][]byte{}
	out := make([][2][]byte, len(f.proxies))
	for i, p := range f.proxies {
		out[i] = p.firstRequests(memo)
	}
	return out
}

// open connects every proxy.
func (f *fleet) open(requests [][2][]byte) error {
	for i, p := range f.proxies {
		if err := p.open(f.address, requests[i][:]...); err != nil {
			return fmt.Errorf("proxy %s: %w", p.id, err)
		}
		go p.run()
	}
	return nil
}

// firstRequests are what a stream begins with: its node, clusters, and where it
// has any, endpoints. Proxies that hold the same share their bytes.
func (p *proxy) firstRequests(memo map[string][]byte) (out [2][]byte) {
	out[0] = subscribe(clusters, p.id, []string{"*"}, p.holding(clusters))
	if p.count[endpoints] == 0 {
		return out
	}
	var raw []byte
	for _, version := range p.held[endpoints] {
		raw = binary.NativeEndian.AppendUint32(raw, version)
	}
	key := string(raw)
	body, ok := memo[key]
	if !ok {
		versions := p.holding(endpoints)
		names := make([]string, 0, len(versions))
		for name := range versions {
			names = append(names, name)
		}
		body = subscribe(endpoints, "", names, versions)
		memo[key] = body
	}
	out[1] = body
	return out
}

func (p *proxy) holding(k kind) map[string]string {
	out := make(map[string]string, p.count[k])
	for name, version := range p.held[k] {
		if version != 0 {
			out[p.fleet.names.text(uint32(name))] = p.fleet.versions.text(version)
		}
	}
	return out
}

// drop ends every connection and waits for their goroutines.
func (f *fleet) drop() {
	for _, p := range f.proxies {
		if p.conn != nil {
			p.closing.Store(true)
			_ = p.conn.Close()
			<-p.done
			p.conn = nil
		}
	}
}

// latencies are how long after a moment each proxy was counted in the last
// round.
func (f *fleet) latencies(since int64) []time.Duration {
	out := make([]time.Duration, len(f.proxies))
	for i, p := range f.proxies {
		out[i] = time.Duration(p.at - since)
	}
	return out
}

// agree checks that every proxy holds the same version of a name.
func (f *fleet) agree(name uint32) error {
	for _, p := range f.proxies {
		if p.held[endpoints][name] != f.proxies[0].held[endpoints][name] {
			return errors.New("proxies do not hold the same version of " + f.names.text(name))
		}
	}
	return nil
}
