package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/roostmesh/roost/cmd/binaries"
)

// fire is the oracle of the address promise with everything real: services come,
// go and come back in a pool that is too small, their instances start and stop,
// an application holds 0.0.0.0 at the port of all services, Envoys and Roost are
// killed; and callers go on calling what they were told.
type fire struct {
	*roost
	rnd      *rand.Rand
	run      map[string]bool // services whose instance is listed
	told     map[string]told // by service
	squatter *binaries.Process
	node     *binaries.Process
	gateway  *binaries.Process
	reached  map[string]int // answers by service
	last     string         // call that reached nobody
	log      []string
}

// told is an address that callers use for a service; until is when the last
// cached answer ends, zero while the service exists.
type told struct {
	address string
	until   time.Time
}

const (
	fireTTL  = 4 * time.Second // long enough for another service to come and be reached
	firePort = 8080
	webPort  = 8088
)

var fireServices = []string{"s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"}

func newFire(t *testing.T, capture, pool string, seed uint64) *fire {
	t.Helper()
	h := machine(t, "fire")
	h.sh("ip", "route", "add", "local", "198.51.100.16/28", "dev", "lo")
	r := newRoost(h, fmt.Sprintf(`node: h1
dns: {addresses: ["127.0.0.1:7453"], ttl: %s, forward: []}
addresses: {internal: %s, quarantine: 2s, dedicated: {public: {cidr: 198.51.100.16/28}}}
capture: {node: %s}
discovery: {file: {path: services.d}}
services: [{name: front, tenant: acme, ports: [{port: 8081, protocol: http}], instances: [{id: front, address: "127.0.0.1:9300"}]}]
listeners: [{name: web, address: "0.0.0.0:%d", protocol: http, gateway: edge}]
routes: [{name: web, tenant: acme, listeners: [web], to: [{service: front}]}]
`, fireTTL, pool, capture, webPort)).serve()
	f := &fire{roost: r, rnd: rand.New(rand.NewPCG(seed, 0)), run: map[string]bool{}, told: map[string]told{}, reached: map[string]int{}}
	for i, s := range append(slices.Clone(fireServices), "pub") {
		h.app("http", s, fmt.Sprintf("0.0.0.0:%d", 9100+i))
	}
	h.app("http", "front", "127.0.0.1:9300")
	f.node, f.gateway = r.envoy("--node", "h1"), r.envoy("--gateway", "edge/h1")
	until(t, "the gateway answers", func() error {
		if got := h.call("http", fmt.Sprintf("http://127.0.0.1:%d/", webPort)); got != "200  front" {
			return fmt.Errorf("got %s", got)
		}
		return nil
	})
	return f
}

func (f *fire) note(format string, args ...any) { f.log = append(f.log, fmt.Sprintf(format, args...)) }

// create makes a service that does not exist, unless the pool is full.
func (f *fire) create(service string) bool {
	flags := []string{"service", "create", "acme/" + service, "--port", fmt.Sprintf("%d:http", firePort)}
	if service == "pub" {
		flags = []string{"service", "create", "acme/pub", "--port", fmt.Sprintf("%d:http", webPort), "--dedicated-pool", "public"}
	}
	f.ok(flags...)
	var s struct {
		Address     *string
		DedicatedIP *string `json:"dedicated_ip"`
	}
	f.json(&s, "service", "show", "acme/"+service)
	address := s.Address
	if service == "pub" {
		address = s.DedicatedIP
	}
	if address == nil {
		f.note("create %s: no address", service)
		f.ok("service", "delete", "acme/"+service)
		return false
	}
	if was, ok := f.told[service]; ok && was.address != *address && time.Now().Before(was.until) {
		f.t.Errorf("%s was %s a moment ago and is %s", service, was.address, *address)
	}
	f.note("create %s: %s", service, *address)
	f.told[service] = told{address: *address}
	return true
}

func (f *fire) remove(service string) {
	f.run[service] = false
	f.instances()
	until(f.t, "delete "+service, func() error { // its instances leave a moment later
		if code, _, errOut := f.cli("service", "delete", "acme/"+service); code != 0 {
			return fmt.Errorf("%s", errOut)
		}
		return nil
	})
	f.note("delete %s", service)
	f.told[service] = told{f.told[service].address, time.Now().Add(fireTTL)}
}

// instances writes the file of instances.
func (f *fire) instances() {
	var b strings.Builder
	b.WriteString("instances:\n")
	for i, s := range append(slices.Clone(fireServices), "pub") {
		if f.run[s] {
			fmt.Fprintf(&b, "  - {tenant: acme, service: %s, id: %s, node: h1, address: \"127.0.0.%d:%d\"}\n", s, s, 1+f.rnd.IntN(2), 9100+i)
		}
	}
	if b.Len() == len("instances:\n") {
		b.Reset()
		b.WriteString("instances: []\n")
	}
	f.file("services.d/i.yaml", b.String())
}

func (f *fire) killEnvoy(supervisor *binaries.Process) {
	for _, pid := range children(supervisor.Pid()) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err == nil {
			f.note("kill envoy %d", pid)
		}
	}
}

// step does one random thing.
func (f *fire) step() {
	service := append(slices.Clone(fireServices), "pub")[f.rnd.IntN(len(fireServices)+1)]
	now, known := f.told[service]
	exists := known && now.until.IsZero()
	switch n := f.rnd.IntN(20); {
	case n < 8 && !exists:
		f.run[service] = f.create(service) && f.rnd.IntN(4) > 0
		f.instances()
	case n < 5:
		f.remove(service)
	case n < 12 && exists:
		f.run[service] = !f.run[service]
		f.note("instance of %s: %v", service, f.run[service])
		f.instances()
	case n < 14:
		if f.squatter == nil { // a service's own application, on the port of all
			f.squatter = f.squat()
		} else {
			f.note("the squatter stops")
			f.squatter.Stop(time.Second)
			f.squatter = nil
		}
	case n < 16:
		f.killEnvoy([]*binaries.Process{f.node, f.gateway}[f.rnd.IntN(2)])
	case n < 17:
		f.note("kill roost")
		f.crash()
		f.serve()
	default:
		<-time.After(time.Duration(f.rnd.IntN(1500)) * time.Millisecond)
	}
}

// squat has s0's application listen on 0.0.0.0 at the services' port, when it
// gets it.
func (f *fire) squat() *binaries.Process {
	self, err := os.Executable()
	if err != nil {
		f.t.Fatal(err)
	}
	cmd := f.command(self)
	cmd.Env = append(os.Environ(), actEnv+"=serve http s0 0.0.0.0:"+strconv.Itoa(firePort))
	p, err := binaries.Start(cmd)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { p.Stop(time.Second) })
	f.note("a squatter starts")
	return p
}

// check calls every address that somebody may still use.
func (f *fire) check() {
	for service, t := range f.told {
		if !t.until.IsZero() && time.Now().After(t.until) {
			continue
		}
		port := firePort
		if service == "pub" {
			port = webPort
		}
		got := f.call("http", fmt.Sprintf("http://%s:%d/", t.address, port))
		if !strings.HasPrefix(got, "200") {
			f.last = fmt.Sprintf("%s at %s: %s", service, t.address, got)
			continue
		}
		f.reached[service]++
		if name := strings.TrimSpace(strings.TrimPrefix(got, "200")); name != service {
			f.t.Fatalf("%s was told to be %s, which reached %s; before:\n%s", service, t.address, name, strings.Join(f.log, "\n"))
		}
	}
}

// TestAddressesUnderFire: not once does an address that was told for one service
// reach another, with addresses bound one by one and with all of them captured.
// It prints its seed; ROOST_E2E_SEED repeats a run and ROOST_E2E_STEPS makes it
// longer.
func TestAddressesUnderFire(t *testing.T) {
	needNetns(t)
	steps := fromEnv("ROOST_E2E_STEPS", 45)
	seed := uint64(fromEnv("ROOST_E2E_SEED", int(time.Now().UnixNano()&0x7fffffff)))
	for capture, pool := range map[string]string{"bind": "127.177.0.0/29", "nft": "100.96.0.0/29"} {
		t.Run(capture, func(t *testing.T) {
			t.Logf("ROOST_E2E_SEED=%d", seed)
			f := newFire(t, capture, pool, seed)
			for _, s := range []string{"s0", "s1", "s2", "pub"} {
				f.create(s)
				f.run[s] = true
			}
			f.instances()
			until(t, "all are reached", func() error {
				f.check()
				if f.reached["s1"] == 0 || f.reached["s2"] == 0 || f.reached["pub"] == 0 {
					return fmt.Errorf("reached %v, problems %+v; %s", f.reached, f.problems(), f.last)
				}
				return nil
			})
			for range steps {
				f.step()
				f.check()
			}
			// Whatever was done to it, it heals.
			if f.squatter != nil {
				f.squatter.Stop(time.Second)
			}
			if now, ok := f.told["s1"]; !ok || !now.until.IsZero() {
				until(t, "there is room", func() error {
					if !f.create("s1") {
						return fmt.Errorf("told %+v", f.told)
					}
					return nil
				})
			}
			f.run["s1"] = true
			f.instances()
			before := f.reached["s1"]
			until(t, "s1 is reached", func() error {
				f.check()
				if f.reached["s1"] == before {
					var p json.RawMessage
					f.json(&p, "problems")
					return fmt.Errorf("not reached; problems %s; %s", p, f.last)
				}
				return nil
			})
		})
	}
}
