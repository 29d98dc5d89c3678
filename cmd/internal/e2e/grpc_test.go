package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"

	"github.com/roostmesh/roost/cmd/binaries"
)

// rawCodec is for calls whose messages are bytes, so that nothing is generated.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)   { return v.([]byte), nil }
func (rawCodec) Unmarshal(b []byte, v any) error { *v.(*[]byte) = b; return nil }
func (rawCodec) Name() string                    { return "raw" }

var _ encoding.Codec = rawCodec{}

// grpcApp answers every call with its name.
func grpcApp(t *testing.T, name string) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.ForceServerCodec(rawCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var in []byte
		if err := stream.RecvMsg(&in); err != nil {
			return err
		}
		return stream.SendMsg([]byte(name))
	}))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.Serve(l) // until Stop
	}()
	t.Cleanup(func() {
		s.Stop()
		<-ended
	})
	return l.Addr().String()
}

// pythonCaller is a Python application with grpcio, C-core's client.
type pythonCaller struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
}

func (r *roost) python(bootstrap string, targets ...string) *pythonCaller {
	r.t.Helper()
	python := binaries.GRPCIOForTest(r.t)
	script, err := filepath.Abs("testdata/call.py")
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := r.command(python.Path, append([]string{script}, targets...)...)
	cmd.Env = append(os.Environ(), "PYTHONPATH="+python.Modules, "GRPC_XDS_BOOTSTRAP="+bootstrap, "no_proxy=127.0.0.1", "no_grpc_proxy=127.0.0.1")
	log := &binaries.Log{}
	cmd.Stderr = log
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		r.t.Fatal(err)
	}
	p, err := binaries.Start(cmd)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		p.Stop(time.Second)
		if r.t.Failed() {
			r.t.Logf("python said:\n%s", log.String())
		}
	})
	return &pythonCaller{r.t, in, bufio.NewReader(out)}
}

// call makes n calls of a target.
func (p *pythonCaller) call(target string, n int) string { return p.within(patience, target, n) }

func (p *pythonCaller) within(d time.Duration, target string, n int) string {
	p.t.Helper()
	if _, err := fmt.Fprintln(p.in, target, n, d.Seconds()); err != nil {
		p.t.Fatal(err)
	}
	line, err := p.out.ReadString('\n')
	if err != nil {
		p.t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// says calls until the answer is want.
func (p *pythonCaller) says(target string, n int, want string) {
	p.t.Helper()
	until(p.t, target+" says "+want, func() error {
		if got := p.call(target, n); got != want {
			return errors.New(got)
		}
		return nil
	})
}

// TestGRPCWithoutEnvoy: a Python application reaches services of its tenant with
// no Envoy anywhere: by weight, past an instance that drains, after a move, and
// through a restart of Roost.
func TestGRPCWithoutEnvoy(t *testing.T) {
	r := newRoost(host{t, ""}, onLoopback(t, "127.160.0.0/16", `discovery: {file: {path: services.d}}
services:
  - {name: web, tenant: acme, ports: [{port: 18090, protocol: http}]}
  - {name: shop, tenant: acme, ports: [{port: 18091, protocol: grpc}], load_balancing: {policy: least_request}, outlier_detection: {consecutive_5xx: 5}}
  - {name: idle, tenant: acme, ports: [{port: 18092, protocol: grpc}]}
  - {name: secret, tenant: globex, ports: [{port: 18093, protocol: grpc}]}
`))
	one, two, three := grpcApp(t, "one"), grpcApp(t, "two"), grpcApp(t, "three")
	instances := func(list ...string) {
		var b strings.Builder
		b.WriteString("instances:\n")
		for _, i := range append(list, "service: web, id: web-1, address: 127.0.0.43:9001", "tenant: globex, service: secret, id: s, address: "+three) {
			if !strings.Contains(i, "tenant:") {
				i = "tenant: acme, " + i
			}
			fmt.Fprintf(&b, "  - {%s}\n", i)
		}
		r.file("services.d/i.yaml", b.String())
	}
	instances("service: shop, id: shop-1, weight: 1, zone: a, address: "+one, "service: shop, id: shop-2, weight: 3, zone: a, address: "+two)
	r.serve()
	code, out, errOut := r.cli("bootstrap", "--config", r.config, "--grpc", "acme/web/web-1@h1")
	if code != 0 {
		t.Fatalf("bootstrap: exit %d: %s", code, errOut)
	}
	r.file("bootstrap.json", out)
	p := r.python(filepath.Join(r.dir, "bootstrap.json"), "shop.acme", "idle.acme", "secret.globex")

	got := p.call("shop.acme", 400)
	var a, b int
	if n, err := fmt.Sscanf(got, "one=%d two=%d", &a, &b); n != 2 || err != nil || a+b != 400 || b < 240 || b > 360 {
		t.Errorf("400 calls by weight 1 and 3: %s", got)
	}
	p.says("idle.acme", 1, "UNAVAILABLE")
	if code, _, errOut := r.cli("drain", "acme/shop/shop-1"); code != 0 {
		t.Fatalf("drain: exit %d: %s", code, errOut)
	}
	p.says("shop.acme", 50, "two=50")
	instances("service: shop, id: shop-3, address: "+three, "service: idle, id: idle-1, address: "+one)
	p.says("shop.acme", 50, "three=50")
	p.says("idle.acme", 50, "one=50")

	status := regexp.MustCompile(`(?m)^grpc~acme~web~web-1@h1(#[23])? +grpc +acme `)
	if _, out, _ := r.cli("status"); len(status.FindAllString(out, -1)) != 2 {
		t.Errorf("status:\n%s", out)
	}
	for _, problem := range r.problems() {
		if problem.Code == "proxy_rejected" {
			t.Errorf("a gRPC client refuses: %+v", problem)
		}
	}
	r.run.Stop(5 * time.Second)
	p.says("shop.acme", 50, "three=50")
	r.serve()
	instances("service: shop, id: shop-3, address: " + two)
	p.says("shop.acme", 50, "two=50")
	// gRPC itself gives up a name that is not there after 15 s.
	if got := p.within(time.Second, "secret.globex", 1); got != "DEADLINE_EXCEEDED" {
		t.Errorf("a service of another tenant says %s", got)
	}
}
