package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	cachetypes "github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	resourcev3 "github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"

	"github.com/roostmesh/roost/xds/envoy"
)

// peer is go-control-plane's side: a LinearCache for each type behind a
// MuxCache, with the resources that Roost's proxies of one tenant get. It has
// no pipeline: a change is one new ClusterLoadAssignment.
type peer struct {
	size
	endpoints *cachev3.LinearCache
	current   map[string]proto.Message
	moves     int
	serving   chan error
}

func (p *peer) start(ctx context.Context, s size, l net.Listener) (answer, error) {
	p.size = s
	w := newWorld(s)
	w.build()
	clusters, endpoints := w.held()
	clusterMessages, err := messages(clusters)
	if err != nil {
		return answer{}, err
	}
	if p.current, err = messages(endpoints); err != nil {
		return answer{}, err
	}
	p.endpoints = linear(resourcev3.EndpointType, p.current)
	mux := &cachev3.MuxCache{
		Classify:      func(q *cachev3.Request) string { return q.GetTypeUrl() },
		ClassifyDelta: func(q *cachev3.DeltaRequest) string { return q.GetTypeUrl() },
		Caches: map[string]cachev3.Cache{
			resourcev3.ClusterType: linear(resourcev3.ClusterType, clusterMessages), resourcev3.EndpointType: p.endpoints,
		},
	}
	for _, t := range []string{resourcev3.ListenerType, resourcev3.RouteType, resourcev3.SecretType, resourcev3.ExtensionConfigType} {
		mux.Caches[t] = linear(t, nil)
	}
	g := grpc.NewServer(
		grpc.MaxRecvMsgSize(32<<20), grpc.MaxConcurrentStreams(1_000_000),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, serverv3.NewServer(ctx, mux, nil))
	p.serving = make(chan error, 1)
	go func() { p.serving <- g.Serve(l) }()
	context.AfterFunc(ctx, g.Stop)
	return answer{Held: len(clusters)}, nil
}

// messages decodes resources, by name.
func messages(list []*envoy.Resource) (map[string]proto.Message, error) {
	out := map[string]proto.Message{}
	for _, r := range list {
		m, err := r.Message()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", r.Name.Name, err)
		}
		out[r.Name.Name] = m
	}
	return out, nil
}

func linear(url string, list map[string]proto.Message) *cachev3.LinearCache {
	resources := make(map[string]cachetypes.Resource, len(list))
	for name, m := range list {
		resources[name] = m
	}
	return cachev3.NewLinearCache(url, cachev3.WithInitialResources(resources))
}

func (p *peer) wait() (err error) {
	if p.serving != nil {
		err = <-p.serving
	}
	return err
}

func (p *peer) change(service int) (answer, error) {
	name := p.clusterName(service)
	at := time.Now().UnixNano()
	now, ok := p.current[name].(*endpointv3.ClusterLoadAssignment)
	if !ok {
		return answer{}, errors.New("nobody has " + name)
	}
	next := proto.CloneOf(now)
	p.moves++
	next.GetEndpoints()[0].GetLbEndpoints()[0].GetEndpoint().GetAddress().GetSocketAddress().Address = moved(p.moves).String()
	p.current[name] = next
	err := p.endpoints.UpdateResource(name, next)
	return answer{Name: name, At: at}, err
}

func (p *peer) flap(time.Duration) ([]landed, error) {
	return nil, errors.New("the peer has nothing that flaps")
}

func (p *peer) load(int, time.Duration) ([]landed, error) {
	return nil, errors.New("the peer is not put under load")
}
