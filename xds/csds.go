package xds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	adminv3 "github.com/envoyproxy/go-control-plane/envoy/admin/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statusv3 "github.com/envoyproxy/go-control-plane/envoy/service/status/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/roostmesh/roost/lb"
	"github.com/roostmesh/roost/xds/envoy"
)

// FetchClientStatus implements the client status discovery service
// (envoy.service.status.v3): what connected proxies were sent, have ACKed and
// refuse.
func (v *service) FetchClientStatus(_ context.Context, q *statusv3.ClientStatusRequest) (*statusv3.ClientStatusResponse, error) {
	return v.clientStatus(q)
}

// StreamClientStatus implements the client status discovery service: each request
// is answered with what is so now.
func (v *service) StreamClientStatus(gs statusv3.ClientStatusDiscoveryService_StreamClientStatusServer) error {
	for {
		q, err := gs.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		answer, err := v.clientStatus(q)
		if err != nil {
			return err
		}
		if err := gs.Send(answer); err != nil {
			return err
		}
	}
}

func (v *service) clientStatus(q *statusv3.ClientStatusRequest) (*statusv3.ClientStatusResponse, error) {
	wanted, err := nodesMatching(q.GetNodeMatchers())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	out := &statusv3.ClientStatusResponse{}
	for _, p := range v.Proxies() {
		if !p.Connected || !wanted(p.ID) || v.tenant != "" && (p.Identity.Role != lb.Sidecar || p.Identity.Tenant != v.tenant) {
			continue
		}
		c := &statusv3.ClientConfig{Node: &corev3.Node{Id: p.ID, UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: p.EnvoyVersion}}}
		for t := range envoy.Types {
			held, _ := v.Holding(p.ID, t)
			for _, h := range held {
				c.GenericXdsConfigs = append(c.GenericXdsConfigs, genericConfig(t, h, p, q.GetExcludeResourceContents()))
			}
		}
		out.Config = append(out.Config, c)
	}
	return out, nil
}

// genericConfig is one resource as a proxy holds it. With CSDS's words: what it
// should have and was not sent is NOT_SENT, what it has not answered STALE.
func genericConfig(t envoy.Type, h Held, p ProxyStatus, bare bool) *statusv3.ClientConfig_GenericXdsConfig {
	c := &statusv3.ClientConfig_GenericXdsConfig{TypeUrl: t.URL(), Name: h.Name, VersionInfo: h.Acked}
	switch {
	case h.Rejected != "":
		c.ConfigStatus, c.ClientStatus = statusv3.ConfigStatus_ERROR, adminv3.ClientResourceStatus_NACKED
		c.ErrorState = &adminv3.UpdateFailureState{Details: h.Error, VersionInfo: h.Rejected, LastUpdateAttempt: timestamppb.New(refusedAt(p, t, h.Name))}
	case h.Intended == "" && h.Acked == "":
		c.ConfigStatus, c.ClientStatus = statusv3.ConfigStatus_SYNCED, adminv3.ClientResourceStatus_DOES_NOT_EXIST
	case h.Sent == "":
		c.ConfigStatus, c.ClientStatus = statusv3.ConfigStatus_NOT_SENT, adminv3.ClientResourceStatus_REQUESTED
	case h.Acked == h.Intended:
		c.ConfigStatus, c.ClientStatus = statusv3.ConfigStatus_SYNCED, adminv3.ClientResourceStatus_ACKED
	default:
		c.ConfigStatus, c.ClientStatus = statusv3.ConfigStatus_STALE, adminv3.ClientResourceStatus_REQUESTED
	}
	if !bare && h.Resource != nil && h.Resource.Body != nil {
		var wrapped discovery.Resource
		if proto.Unmarshal(h.Resource.Body, &wrapped) == nil { // our own bytes
			c.XdsConfig = wrapped.GetResource()
		}
	}
	return c
}

func refusedAt(p ProxyStatus, t envoy.Type, name string) (at time.Time) {
	for _, r := range p.Rejected {
		if r.Type == t && r.Name.Name == name {
			return r.Since
		}
	}
	return at
}

// nodesMatching says which node ids a request is about; without matchers all.
func nodesMatching(list []*matcherv3.NodeMatcher) (func(id string) bool, error) {
	var matchers []func(string) bool
	for _, m := range list {
		if len(m.GetNodeMetadatas()) > 0 {
			return nil, errors.New("node_metadatas are not matched here: use node_id")
		}
		one, err := textMatching(m.GetNodeId())
		if err != nil {
			return nil, err
		}
		matchers = append(matchers, one)
	}
	return func(id string) bool {
		for _, one := range matchers {
			if one(id) {
				return true
			}
		}
		return len(matchers) == 0
	}, nil
}

func textMatching(m *matcherv3.StringMatcher) (func(string) bool, error) {
	fold := func(s string) string { return s }
	if m.GetIgnoreCase() {
		fold = strings.ToLower
	}
	switch p := m.GetMatchPattern().(type) {
	case nil:
		return func(string) bool { return true }, nil
	case *matcherv3.StringMatcher_Exact:
		return func(s string) bool { return fold(s) == fold(p.Exact) }, nil
	case *matcherv3.StringMatcher_Prefix:
		return func(s string) bool { return strings.HasPrefix(fold(s), fold(p.Prefix)) }, nil
	case *matcherv3.StringMatcher_Suffix:
		return func(s string) bool { return strings.HasSuffix(fold(s), fold(p.Suffix)) }, nil
	case *matcherv3.StringMatcher_Contains:
		return func(s string) bool { return strings.Contains(fold(s), fold(p.Contains)) }, nil
	case *matcherv3.StringMatcher_SafeRegex:
		re, err := regexp.Compile("^(?:" + p.SafeRegex.GetRegex() + ")$")
		if err != nil {
			return nil, fmt.Errorf("node_id: %w", err)
		}
		return re.MatchString, nil
	}
	return nil, fmt.Errorf("node_id: a matcher of type %T is not known here", m.GetMatchPattern())
}
