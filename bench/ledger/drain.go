package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	drainWithin   = 200 * time.Millisecond
	drainServices = 20
	instancesEach = 3
)

// drain measures the drain of one instance while many proxies are connected that
// all have it, confirm everything at once and report no load.
func drain(ctx context.Context, o options) (out []figure, err error) {
	r, err := newRoost(ctx, o, map[string]any{"services": declared()})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	proxies, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer func() { stop(); wg.Wait() }()
	var served, acks atomic.Int64
	failed := make(chan error, o.proxies)
	for i := range o.proxies {
		wg.Go(func() {
			p := &proxy{id: fmt.Sprintf("sidecar~acme~s0~p%d@h%d", i, i), served: &served, acks: &acks}
			if err := p.run(proxies, r.xds); err != nil && proxies.Err() == nil {
				failed <- fmt.Errorf("%s: %w", p.id, err)
			}
		})
	}
	if err := until(ctx, func(context.Context) error {
		if n := served.Load(); n != int64(o.proxies) {
			return fmt.Errorf("%d of %d proxies have their endpoints", n, o.proxies)
		}
		return nil
	}); err != nil {
		return nil, err
	}
	took := make([]time.Duration, 0, o.drains)
	for i := range o.drains {
		pause(ctx)
		before := acks.Load()
		d, err := r.drainOne(ctx, fmt.Sprintf("acme/s%d/s%d-%d@%s", i%drainServices, i%drainServices, i%instancesEach, node))
		if err != nil {
			return nil, err
		}
		if n := acks.Load() - before; n < int64(o.proxies) {
			return nil, fmt.Errorf("a drain was over after %d of %d proxies", n, o.proxies)
		}
		took = append(took, d)
	}
	select {
	case err := <-failed:
		return nil, err
	default:
	}
	return quantiles(fmt.Sprintf("drain of an instance that %d proxies have", o.proxies), took, drainWithin), nil
}

// drainOne drains an instance and puts it back into service.
func (r *roost) drainOne(ctx context.Context, name string) (time.Duration, error) {
	path := "/api/v1/instances/" + url.PathEscape(name)
	var result struct {
		Drained bool     `json:"drained"`
		Waiting []string `json:"waiting"`
	}
	began := time.Now()
	if err := r.call(ctx, http.MethodPost, path+"/drain", "", &result); err != nil {
		return 0, err
	}
	took := time.Since(began)
	if !result.Drained {
		return 0, fmt.Errorf("%s did not drain: %v", name, result.Waiting)
	}
	return took, r.call(ctx, http.MethodPost, path+"/undrain", "", nil)
}

// declared are the services of a config file, with their instances.
func declared() (out []map[string]any) {
	for i := range drainServices {
		name := fmt.Sprintf("s%d", i)
		var instances []map[string]any
		for n := range instancesEach {
			instances = append(instances, map[string]any{"id": fmt.Sprintf("%s-%d", name, n), "address": fmt.Sprintf("127.0.0.1:%d", 20000+i*instancesEach+n), "node": node})
		}
		out = append(out, map[string]any{"tenant": "acme", "name": name, "ports": []map[string]any{{"name": "http", "port": port, "protocol": "http"}}, "instances": instances})
	}
	return out
}

// proxy is a delta ADS client on a connection of its own that confirms
// everything.
type proxy struct {
	id     string
	served *atomic.Int64 // proxies that have their endpoints
	acks   *atomic.Int64 // of endpoints, by all proxies
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	known  map[string]bool // clusters whose endpoints were asked for
	full   bool            // endpoints have come
}

func (p *proxy) run(ctx context.Context, at string) (err error) {
	conn, err := grpc.NewClient("passthrough:///"+at, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if p.stream, err = discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx); err != nil {
		return err
	}
	p.known = map[string]bool{}
	first := &corev3.Node{Id: p.id}
	for _, t := range []string{resourcev3.ClusterType, resourcev3.ListenerType} {
		if err := p.stream.Send(&discoveryv3.DeltaDiscoveryRequest{Node: first, TypeUrl: t}); err != nil {
			return err
		}
		first = nil
	}
	for {
		res, err := p.stream.Recv()
		if err != nil {
			return err
		}
		if err := p.take(res); err != nil {
			return err
		}
	}
}

// take confirms a response and asks for the endpoints of new clusters.
func (p *proxy) take(res *discoveryv3.DeltaDiscoveryResponse) error {
	if err := p.stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: res.GetTypeUrl(), ResponseNonce: res.GetNonce()}); err != nil {
		return err
	}
	switch res.GetTypeUrl() {
	case resourcev3.EndpointType:
		if !p.full {
			p.full = true
			p.served.Add(1)
		}
		p.acks.Add(1)
	case resourcev3.ClusterType:
		var fresh []string
		for _, r := range res.GetResources() {
			if !p.known[r.GetName()] {
				p.known[r.GetName()] = true
				fresh = append(fresh, r.GetName())
			}
		}
		if len(fresh) > 0 {
			slices.Sort(fresh)
			return p.stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resourcev3.EndpointType, ResourceNamesSubscribe: fresh})
		}
	}
	return nil
}
