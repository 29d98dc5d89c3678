package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"github.com/roostmesh/roost/cmd/binaries"
)

func cores() int { return runtime.NumCPU() }

// cpuOf is the user and system time of a process, from /proc/PID/stat.
func cpuOf(pid int) time.Duration {
	const tick = 10 * time.Millisecond // USER_HZ is 100 everywhere on Linux
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(data), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * tick
}

// freePorts finds n loopback ports.
func freePorts(n int) ([]int, error) {
	var out []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer func() { _ = l.Close() }()
		out = append(out, l.Addr().(*net.TCPAddr).Port)
	}
	return out, nil
}

// start runs a program until the bench ends; what it says goes into a file.
func (b *bench) start(name, path string, args ...string) (*binaries.Process, error) {
	out, err := b.log(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }()
	cmd := exec.Command(path, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = b.dir, out, out
	p, err := binaries.Start(cmd)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	b.processes = append(b.processes, p)
	return p, nil
}

func (b *bench) startConsul(ctx context.Context, path string) error {
	p, err := freePorts(7)
	if err != nil {
		return err
	}
	config := fmt.Sprintf("disable_update_check = true\nports { http = %d https = -1 dns = %d grpc = %d grpc_tls = %d serf_lan = %d serf_wan = %d server = %d }\n", p[0], p[1], p[2], p[3], p[4], p[5], p[6])
	file := filepath.Join(b.dir, "consul.hcl")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	if b.consul, err = b.start("consul", path, "agent", "-dev", "-bind", "127.0.0.1", "-config-file", file, "-log-level", "error"); err != nil {
		return err
	}
	if b.client, err = api.NewClient(&api.Config{Address: portText(p[0])}); err != nil {
		return err
	}
	return until(ctx, 30*time.Second, func() error {
		leader, err := b.client.Status().Leader()
		if err == nil && leader == "" {
			err = errors.New("consul has no leader")
		}
		return err
	})
}

func (b *bench) startRoost(ctx context.Context, envoy string) error {
	p, err := freePorts(3)
	if err != nil {
		return err
	}
	b.admin = "http://" + portText(p[0])
	consul, err := b.client.Agent().Self()
	if err != nil {
		return err
	}
	node, _ := consul["Config"]["NodeName"].(string)
	config, err := json.Marshal(map[string]any{
		"node": node, "data_dir": "data", "admin": map[string]any{"address": portText(p[0])}, "xds": map[string]any{"address": portText(p[1])},
		"dns":       map[string]any{"addresses": []string{portText(p[2])}, "forward": []string{}},
		"discovery": map[string]any{"consul": map[string]any{"address": "http://" + b.consulAddress()}},
		"addresses": map[string]any{"internal": "127.140.0.0/16"}, "log": map[string]any{"level": "warn"},
	})
	if err != nil {
		return err
	}
	file := filepath.Join(b.dir, "roost.yaml")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return err
	}
	program, err := filepath.Abs(b.options.roost)
	if err != nil {
		return err
	}
	if b.roost, err = b.start("roost", program, "run", "--config", file); err != nil {
		return fmt.Errorf("%w: make build first", err)
	}
	if err := until(ctx, 60*time.Second, func() error { return get(ctx, b.admin+"/readyz") }); err != nil {
		return err
	}
	_, err = b.start("envoy", program, "envoy", "--config", file, "--node", node, "--envoy", envoy)
	return err
}

func (b *bench) consulAddress() string {
	data, err := os.ReadFile(filepath.Join(b.dir, "consul.hcl"))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(data), "http = ")
	port, _, _ := strings.Cut(rest, " ")
	return "127.0.0.1:" + port
}

// roostAddress waits for a service and returns its address with the port that
// callers dial.
func (b *bench) roostAddress(ctx context.Context, tenant, service string) (string, error) {
	var s struct {
		Address string
		Ports   []struct{ Port int }
	}
	err := until(ctx, 30*time.Second, func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.admin+"/api/v1/services/"+tenant+"/"+service, nil)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer func() { _ = res.Body.Close() }()
		if err := json.NewDecoder(res.Body).Decode(&s); err != nil {
			return err
		}
		if s.Address == "" || len(s.Ports) == 0 {
			return errors.New("the service is not there yet")
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s:%d", s.Address, s.Ports[0].Port), nil
}
