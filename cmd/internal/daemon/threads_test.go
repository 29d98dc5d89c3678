package daemon

import (
	"net/netip"
	"slices"
	"testing"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/roostmesh/roost/discovery"
	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// These are failures of other meshes, by the thread that reports them.

// instance is one of a service that asks for a port, as Consul would show it.
func (w *world) instance(key lb.Key, id string) discovery.Instance {
	i := discovery.Instance{
		ID: id, Key: key, Weight: 1, Health: discovery.Passing, Source: SourceConsul, Ports: []discovery.Port{{Number: 9000}},
		Wants: []discovery.WantedPort{{Name: "a", Dial: 80, Protocol: lb.TCP}},
	}
	w.place(&i)
	return i
}

// address is the internal one of a service.
func (w *world) address(key lb.Key) netip.Addr {
	if s := w.d.snapshot.Load().Services.Get(key); s != nil {
		return s.Address
	}
	return netip.Addr{}
}

func (w *world) addresses() map[lb.Key]netip.Addr {
	out := map[lb.Key]netip.Addr{}
	for _, key := range oracleKeys {
		if a := w.address(key); a.IsValid() {
			out[key] = a
		}
	}
	return out
}

// stays fails where a service has another address than before.
func (w *world) stays(after string, before map[lb.Key]netip.Addr) {
	w.t.Helper()
	for key, was := range before {
		if now := w.address(key); now != was {
			w.t.Fatalf("after %s %s has %s, it was %s", after, key, now, was)
		}
	}
}

// TestConsul23620: the last instance leaves, others want its address, and the
// service comes back: the address was its own all the time.
func TestConsul23620(t *testing.T) {
	w := quietWorld(t)
	first := oracleKeys[0]
	w.change([]discovery.Instance{w.instance(first, "i1")})
	was := w.address(first)
	w.change(nil)
	w.pass(100 * (w.quarantine + ttlMargin))
	for _, key := range oracleKeys[1:] { // more than the pool has room for
		w.put(key, oracleBodies[0])
		if w.address(key) == was {
			t.Fatalf("%s was given the address of %s, which has no instance", key, first)
		}
	}
	if now := w.address(first); !was.IsValid() || now != was {
		t.Errorf("without an instance: %s, it was %s", now, was)
	}
	w.change([]discovery.Instance{w.instance(first, "i2")})
	w.stays("it came back", map[lb.Key]netip.Addr{first: was})
}

// TestKuma13463: a restart, also one with more services or from an old backup,
// numbers nothing anew.
func TestKuma13463(t *testing.T) {
	w := quietWorld(t)
	w.put(oracleKeys[3], oracleBodies[0])
	w.model.declared[oracleKeys[5]] = oracleBodies[1]
	w.reload()
	w.doBackup()
	w.put(oracleKeys[1], oracleBodies[0])
	before := w.addresses()
	if len(before) != 3 {
		t.Fatalf("addresses: %v", before)
	}
	w.die()
	w.start()
	w.stays("a restart", before)
	w.die()
	w.model.declared[oracleKeys[0]], w.model.declared[oracleKeys[2]] = oracleBodies[0], oracleBodies[0]
	w.start()
	w.stays("a restart with more services", before)
	w.die()
	w.copyFile(w.backups[0], w.dir+"/"+ledgerFile)
	w.start()
	w.stays("an old backup", before)
}

// TestKuma13592: neither other ports nor another order of what is declared
// numbers anything anew.
func TestKuma13592(t *testing.T) {
	w := quietWorld(t)
	for _, key := range oracleKeys[:4] {
		w.model.declared[key] = oracleBodies[0]
	}
	w.reload()
	w.put(oracleKeys[6], oracleBodies[0])
	before := w.addresses()
	w.put(oracleKeys[6], oracleBodies[2])
	for _, key := range oracleKeys[:4] {
		w.model.declared[key] = oracleBodies[2]
	}
	w.reload()
	w.stays("other ports", before)
	c := w.config()
	slices.Reverse(c.Model.Services)
	c.Model.InternalPools = slices.Clone(c.Model.InternalPools)
	slices.Reverse(c.Model.InternalPools)
	w.r.setConfig(c)
	w.build()
	w.stays("another order", before)
}

// targets are the endpoints of a service in the World of now; ok says that its
// assignment is there.
func (w *world) targets(key lb.Key) (at []netip.Addr, ok bool) {
	r := w.r.world.View(envoy.Proxy{Identity: lb.Identity{Role: lb.Node, Node: "h1"}}).Get(envoy.Name{Type: envoy.Endpoint, Name: lb.ClusterName(key, "a", "")})
	if r == nil {
		return nil, false
	}
	m, err := r.Message()
	w.must(err)
	_, ok = m.(*endpointv3.ClusterLoadAssignment)
	return w.decoded.endpoints(r), ok
}

// TestMoby33790: an address never leads to what is gone; with nothing left the
// assignment is there and empty.
func TestMoby33790(t *testing.T) {
	w := quietWorld(t)
	key := oracleKeys[0]
	gone, killed, moving := w.instance(key, "gone"), w.instance(key, "killed"), w.instance(key, "moving")
	expect := func(what string, want ...netip.Addr) {
		t.Helper()
		if got, ok := w.targets(key); !ok || !slices.Equal(got, want) {
			t.Errorf("%s: %v, there %v; want %v", what, got, ok, want)
		}
	}
	w.change([]discovery.Instance{gone, killed, moving})
	expect("all", gone.Address, killed.Address, moving.Address)
	w.change([]discovery.Instance{killed, moving})
	expect("one is gone", killed.Address, moving.Address)
	killed.Health = discovery.Critical
	w.change([]discovery.Instance{killed, moving})
	expect("one is dead", moving.Address)
	w.place(&moving)
	w.change([]discovery.Instance{killed, moving})
	expect("one has moved", moving.Address)
	w.change([]discovery.Instance{killed})
	expect("only a dead one is left")
	w.change(nil)
	expect("none is left")
	w.die()
	w.start()
	expect("none after a restart")
}
