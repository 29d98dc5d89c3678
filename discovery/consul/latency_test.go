package consul

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/cmd/binaries"
	"github.com/roostmesh/roost/discovery"
)

// BenchmarkPutToEmit is the time from a registration's PUT, with a real Consul,
// to its Update: of a service that has just changed, and of one that has not for
// long and may share the sweep.
func BenchmarkPutToEmit(b *testing.B) {
	for _, c := range []struct {
		services int
		tls      bool
	}{{100, false}, {300, false}, {1000, false}, {1000, true}} {
		b.Run(fmt.Sprintf("services=%d/tls=%v", c.services, c.tls), func(b *testing.B) {
			agent := binaries.StartConsul(b, binaries.ConsulConfig{TLS: c.tls})
			config := Config{Name: "consul", Address: "http://" + agent.HTTPAddr}
			if c.tls {
				config.Address, config.CAFile = "https://"+agent.HTTPSAddr, agent.CAFile
			}
			client, err := api.NewClient(&api.Config{Address: agent.HTTPAddr})
			if err != nil {
				b.Fatal(err)
			}
			name := func(n int) string { return fmt.Sprintf("s%d", n%c.services) }
			put := func(n, port int) {
				err := client.Agent().ServiceRegister(&api.AgentServiceRegistration{ID: name(n), Name: name(n), Address: "10.0.0.1", Port: port, Meta: map[string]string{"roost-tenant": "acme"}})
				if err != nil {
					b.Fatal(err)
				}
			}
			for n := range c.services {
				put(n, 1)
			}
			s, err := New(config)
			if err != nil {
				b.Fatal(err)
			}
			updates, done := make(chan discovery.Update, 1<<16), make(chan struct{})
			ctx, cancel := context.WithCancel(b.Context())
			go func() {
				defer close(done)
				_ = s.Run(ctx, func(u discovery.Update) { updates <- u }) // ends with ctx
			}()
			defer func() { cancel(); <-done }()
			for u := range updates {
				if u.Complete {
					break
				}
			}
			for _, kind := range []string{"same", "any"} {
				b.Run(kind, func(b *testing.B) { measure(b, updates, kind == "same", name, put) })
			}
		})
	}
}

// ports are never used twice, so that each registration is a change.
var ports = 1

// measure registers once in a while, as a fleet does.
func measure(b *testing.B, updates <-chan discovery.Update, same bool, name func(int) string, put func(n, port int)) {
	const gap, stride = 100 * time.Millisecond, 7919
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		n := 0
		if !same {
			n = i * stride
		}
		<-time.After(gap)
		ports++
		began := time.Now()
		put(n, ports)
		for u := range updates {
			if u.Scope == name(n) && len(u.Instances) == 1 && int(u.Instances[0].Ports[0].Number) == ports {
				break
			}
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}
