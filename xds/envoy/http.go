package envoy

import (
	"net/netip"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	mutationrulesv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/early_header_mutation/header_mutation/v3"
	xffv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/http/original_ip_detection/xff/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/roostmesh/roost/lb"
)

const (
	rdsTimeout     = 15 * time.Second
	headersTimeout = 10 * time.Second
	idleTimeout    = time.Hour
	streamIdle     = 5 * time.Minute
)

// noAddress is an address that no caller has.
var noAddress = netip.MustParsePrefix("255.255.255.255/32")

// localReplies gives each reason of Envoy's own answers its word. The first
// flag that is set decides, so the cause stands before what followed from it.
var localReplies = []struct{ reason, flag string }{
	{"denied", "UAEX"}, {"%METADATA(ROUTE:roost:reason)%", "UH"}, {"no_endpoint", "NC"}, {"connect_failed", "UF"}, {"overflow", "UO"},
	{"upstream_timeout", "UT"}, {"upstream_timeout", "SI"}, {"upstream_timeout", "DT"}, {"upstream_reset", "UC"}, {"upstream_reset", "UR"}, {"upstream_reset", "LR"}, {"upstream_reset", "UPE"}, {"no_route", "NR"},
}

// localReply names the reason in a header, and for a service without a running
// instance says so in words.
func localReply() *hcmv3.LocalReplyConfig {
	out := &hcmv3.LocalReplyConfig{}
	for _, l := range localReplies {
		m := &hcmv3.ResponseMapper{
			Filter:       &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ResponseFlagFilter{ResponseFlagFilter: &accesslogv3.ResponseFlagFilter{Flags: []string{l.flag}}}},
			HeadersToAdd: []*corev3.HeaderValueOption{addHeader(ReasonHeader, l.reason)},
		}
		if l.flag == "UH" {
			m.HeadersToAdd = append(m.HeadersToAdd, addHeader("retry-after", "1"))
			m.BodyFormatOverride = &corev3.SubstitutionFormatString{Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
				Specifier: &corev3.DataSource_InlineString{InlineString: "service %METADATA(CLUSTER:roost:service)% of tenant %METADATA(CLUSTER:roost:tenant)% %METADATA(ROUTE:roost:says)%\n"}}}}
		}
		out.Mappers = append(out.Mappers, m)
	}
	return out
}

// connectionManager handles HTTP of one service port or public listener, with
// its routes under the given name.
func connectionManager(stat, routes, protocol string, logs []*accesslogv3.AccessLog) *hcmv3.HttpConnectionManager {
	m := &hcmv3.HttpConnectionManager{
		StatPrefix: stat,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			RouteConfigName: routes, ConfigSource: fromADS(rdsTimeout),
		}},
		HttpFilters:                []*hcmv3.HttpFilter{{Name: "envoy.filters.http.router", ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(&routerv3.Router{SuppressEnvoyHeaders: true})}}},
		UseRemoteAddress:           wrapperspb.Bool(false),
		SkipXffAppend:              true,
		ServerHeaderTransformation: hcmv3.HttpConnectionManager_PASS_THROUGH,
		Http2ProtocolOptions:       http2Options(),
		CommonHttpProtocolOptions:  &corev3.HttpProtocolOptions{IdleTimeout: seconds(idleTimeout), HeadersWithUnderscoresAction: corev3.HttpProtocolOptions_ALLOW},
		StreamIdleTimeout:          seconds(streamIdle),
		LocalReplyConfig:           localReply(),
		AccessLog:                  logs,
		UpgradeConfigs:             []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		// Callers' headers must not steer Envoy: nobody is internal.
		InternalAddressConfig: &hcmv3.HttpConnectionManager_InternalAddressConfig{CidrRanges: []*corev3.CidrRange{cidr(noAddress)}},
	}
	if protocol == lb.GRPC {
		m.StreamIdleTimeout = seconds(0)
	}
	return m
}

// edge makes a connection manager fit to face clients that nobody knows.
func edge(m *hcmv3.HttpConnectionManager, l *lb.Listener) {
	m.UseRemoteAddress, m.SkipXffAppend = wrapperspb.Bool(true), false
	m.NormalizePath, m.MergeSlashes = wrapperspb.Bool(true), true
	m.PathWithEscapedSlashesAction = hcmv3.HttpConnectionManager_KEEP_UNCHANGED
	m.RequestHeadersTimeout = seconds(headersTimeout)
	if to := l.RedirectsTo; to != nil && RedirectPort(to) == httpsPort {
		// Otherwise the plain port would stand in the address redirected to.
		m.StripPortMode = &hcmv3.HttpConnectionManager_StripAnyHostPort{StripAnyHostPort: true}
	}
	if len(l.Spec.TrustedProxies) == 0 {
		// What a client says of itself is not believed; Envoy then writes its own.
		m.EarlyHeaderMutationExtensions = []*corev3.TypedExtensionConfig{{Name: "envoy.http.early_header_mutation.header_mutation", TypedConfig: pack(&mutationv3.HeaderMutation{
			Mutations: []*mutationrulesv3.HeaderMutation{{Action: &mutationrulesv3.HeaderMutation_Remove{Remove: "x-forwarded-for"}}},
		})}}
	} else {
		trusted := &xffv3.XffTrustedCidrs{}
		for _, p := range l.Spec.TrustedProxies {
			trusted.Cidrs = append(trusted.Cidrs, cidr(p))
		}
		m.UseRemoteAddress = wrapperspb.Bool(false)
		m.OriginalIpDetectionExtensions = []*corev3.TypedExtensionConfig{{Name: "envoy.http.original_ip_detection.xff", TypedConfig: pack(&xffv3.XffConfig{XffTrustedCidrs: trusted, SkipXffAppend: wrapperspb.Bool(false)})}}
	}
}

func httpFilter(m *hcmv3.HttpConnectionManager) *listenerv3.Filter {
	return &listenerv3.Filter{Name: "envoy.filters.network.http_connection_manager", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(m)}}
}
