package consul

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/discovery"
)

// world is a Source at a real Consul, behind a real Aggregator.
type world struct {
	t      *testing.T
	ctx    context.Context
	agent  *binaries.ConsulAgent
	client *api.Client
	source *Source
	all    *discovery.Aggregator

	metrics *prometheus.Registry
}

func newWorld(t *testing.T, cc binaries.ConsulConfig, c Config) *world {
	t.Helper()
	w := newWorldAt(t, binaries.StartConsul(t, cc))
	switch {
	case c.Address != "":
	case w.agent.HTTPSAddr != "":
		c.Address, c.CAFile = "https://"+w.agent.HTTPSAddr, w.agent.CAFile
	default:
		c.Address = "http://" + w.agent.HTTPAddr
	}
	w.watch(c)
	return w
}

// newWorldAt is one that is not watched yet.
func newWorldAt(t *testing.T, agent *binaries.ConsulAgent) *world {
	t.Helper()
	return &world{t: t, agent: agent, client: clientOf(t, agent)}
}

func clientOf(t *testing.T, a *binaries.ConsulAgent) *api.Client {
	t.Helper()
	client, err := api.NewClient(&api.Config{Address: a.HTTPAddr, Token: a.Token, Transport: &http.Transport{DisableKeepAlives: true}})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// patience is how long a test waits for what does not come: no machine is so busy
// that what does come takes this long.
const patience = 3 * time.Minute

// watch runs the source until the test ends.
func (w *world) watch(c Config) {
	w.t.Helper()
	w.metrics = prometheus.NewRegistry()
	c.Registerer = w.metrics
	w.source = newSource(w.t, c)
	w.all = discovery.NewAggregator(discovery.Config{Sources: []discovery.Source{w.source}, Guard: []string{"consul"}, ProbeEvery: 100 * time.Millisecond, Registerer: w.metrics})
	var cancel context.CancelFunc
	w.ctx, cancel = context.WithTimeout(w.t.Context(), patience)
	done := make(chan error, 1)
	go func() { done <- w.all.Run(w.ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
	w.until("the first pass", func(c *discovery.Catalog) string {
		if c.Ready {
			return ""
		}
		return "not ready"
	})
}

// gauge is the value of a metric, whichever its kind.
func (w *world) gauge(name string) float64 {
	w.t.Helper()
	families, err := w.metrics.Gather()
	w.must(err)
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue() + f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	w.t.Fatalf("no metric %s", name)
	return 0
}

// until waits for a Catalog of which what is wrong is "".
func (w *world) until(what string, wrong func(*discovery.Catalog) string) {
	w.t.Helper()
	for {
		said := wrong(w.all.Catalog())
		if said == "" {
			return
		}
		select {
		case <-w.all.Changed():
		case <-w.ctx.Done():
			w.t.Fatalf("%s: %s; problems %+v", what, said, w.all.Catalog().Problems)
		}
	}
}

// have waits until the services of acme, globex, ... have exactly these
// instances, each "ID ADDRESS:PORT HEALTH wWEIGHT", and a ? where it is stale.
func (w *world) have(what string, want ...string) {
	w.t.Helper()
	w.until(what, func(c *discovery.Catalog) string {
		var got []string
		for _, g := range c.Groups.All() {
			for _, i := range g.Instances {
				text := fmt.Sprintf("%s %s:%d %s w%d", i.Name(), i.Address, i.Ports[0].Number, i.Health, i.Weight)
				if i.Stale {
					text += "?"
				}
				got = append(got, text)
			}
		}
		if sameSet(got, want) {
			return ""
		}
		return fmt.Sprintf("have %q, want %q", got, want)
	})
}

func sameSet(a, b []string) bool {
	count := map[string]int{}
	for _, s := range a {
		count[s]++
	}
	for _, s := range b {
		count[s]--
	}
	for _, n := range count {
		if n != 0 {
			return false
		}
	}
	return true
}

// poll asks until there is no error.
func poll(ctx context.Context, f func() error) error {
	return binaries.Poll(ctx, 10*time.Millisecond, f)
}

func (w *world) problem(code string) {
	w.t.Helper()
	w.until("problem "+code, func(c *discovery.Catalog) string {
		for _, p := range c.Problems {
			if p.Code == code {
				return ""
			}
		}
		return "not there"
	})
}

// noProblem waits until nothing is wrong.
func (w *world) noProblem() {
	w.t.Helper()
	w.until("no problem", func(c *discovery.Catalog) string {
		if len(c.Problems) > 0 {
			return fmt.Sprintf("%+v", c.Problems)
		}
		return ""
	})
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func meta(tenant string) map[string]string { return map[string]string{"roost-tenant": tenant} }

// put registers service shop's instance.
func (w *world) put(id, address string, port int, meta map[string]string, change ...func(*api.AgentServiceRegistration)) {
	w.t.Helper()
	r := &api.AgentServiceRegistration{ID: id, Name: "shop", Address: address, Port: port, Meta: meta}
	for _, f := range change {
		f(r)
	}
	w.must(w.client.Agent().ServiceRegister(r))
}

// listen serves a port that probes find alive.
func listen(t *testing.T) (port int, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	stop = sync.OnceFunc(func() { _ = l.Close(); <-done })
	t.Cleanup(stop)
	return l.Addr().(*net.TCPAddr).Port, stop
}

// door passes connections on to a Consul, and later to another one.
type door struct {
	net.Listener
	mu    sync.Mutex
	to    string     // guarded by mu
	conns []net.Conn // guarded by mu
	wg    sync.WaitGroup
}

func newDoor(t *testing.T, to string) *door {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := &door{Listener: l, to: to}
	d.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			d.mu.Lock()
			out, err := net.Dial("tcp", d.to)
			if err != nil {
				_ = in.Close()
				d.mu.Unlock()
				continue
			}
			d.conns = append(d.conns, in, out)
			d.mu.Unlock()
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				d.wg.Go(func() {
					buffer := make([]byte, 1<<16)
					for {
						n, err := pair[0].Read(buffer)
						if err == nil {
							_, err = pair[1].Write(buffer[:n])
						}
						if err != nil {
							_ = pair[0].Close()
							_ = pair[1].Close()
							return
						}
					}
				})
			}
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		d.lead("")
		d.wg.Wait()
	})
	return d
}

// lead ends every connection; the next ones go elsewhere.
func (d *door) lead(to string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to = to
	for _, c := range d.conns {
		_ = c.Close()
	}
	d.conns = nil
}

// writeToken renames, as whoever rotates tokens does: half a token is another one.
func writeToken(t *testing.T, file, token string) {
	t.Helper()
	next := file + ".next"
	if err := os.WriteFile(next, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, file); err != nil {
		t.Fatal(err)
	}
}

// token makes a token with these rules.
func (w *world) token(name, rules string) string {
	w.t.Helper()
	acl := w.client.ACL()
	_, _, err := acl.PolicyCreate(&api.ACLPolicy{Name: name, Rules: rules}, nil)
	w.must(err)
	token, _, err := acl.TokenCreate(&api.ACLToken{Policies: []*api.ACLTokenPolicyLink{{Name: name}}}, nil)
	w.must(err)
	return token.SecretID
}

// many registers services s0, s1, ...
func (w *world) many(n int) {
	w.t.Helper()
	for i := range n {
		w.one(i, 80)
	}
	w.until("all instances", func(c *discovery.Catalog) string {
		if c.Groups.Len() != n {
			return fmt.Sprintf("%d services", c.Groups.Len())
		}
		return ""
	})
}

func (w *world) one(i, port int) {
	w.t.Helper()
	name := fmt.Sprintf("s%d", i)
	w.put(name, "10.0.0.1", port, meta("acme"), func(r *api.AgentServiceRegistration) { r.Name = name })
}

// moved waits until service i has its instance at port, and returns since when.
func (w *world) moved(i, port int) {
	w.t.Helper()
	key := discovery.Key{Tenant: "acme", Service: fmt.Sprintf("s%d", i)}
	w.until(fmt.Sprintf("%s moves to %d", key, port), func(c *discovery.Catalog) string {
		if g := c.Groups.Get(key); g == nil || len(g.Instances) != 1 || g.Instances[0].Ports[0].Number != uint16(port) {
			return fmt.Sprintf("%+v", g)
		}
		return ""
	})
}
