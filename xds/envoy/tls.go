package envoy

import (
	"crypto/rsa"
	"fmt"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"github.com/roostmesh/roost/certs"
	"github.com/roostmesh/roost/lb"
)

// secret is one certificate of a public listener.
type secret struct {
	name string
	pair *certs.Pair
}

// secretsOf are the usable certificates of a listener, in its order.
func secretsOf(l *lb.Listener, pairs certs.Pairs) []secret {
	var out []secret
	for i, c := range l.Spec.Certificates {
		if p := pairs[certs.File{CertFile: c.CertFile, KeyFile: c.KeyFile}]; p != nil {
			out = append(out, secret{fmt.Sprintf("%s:%d", l.Spec.Name, i), p})
		}
	}
	return out
}

func (s secret) resource() *Resource {
	inline := func(b []byte) *corev3.DataSource {
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
	}
	return encode(Secret, s.name, &tlsv3.Secret{Name: s.name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(s.pair.Chain), PrivateKey: inline(s.pair.Key),
	}}})
}

// terminate makes l end TLS: one filter chain for the names of each
// certificate, and one that refuses all other names by an alert.
func terminate(l *listenerv3.Listener, filter *listenerv3.Filter, secrets []secret) []Name {
	l.ListenerFilters = append(l.ListenerFilters, &listenerv3.ListenerFilter{Name: "envoy.filters.listener.tls_inspector", ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(&tlsinspectorv3.TlsInspector{})}})
	var refs []Name
	taken := map[string]bool{}
	refuse := true
	for _, s := range secrets {
		var names []string
		for _, n := range s.pair.Names {
			if !taken[n] {
				taken[n] = true
				names = append(names, n)
			}
		}
		if len(names) == 0 && len(s.pair.Names) > 0 || len(names) == 0 && !refuse {
			continue // other certificates have all its names
		}
		chain := &listenerv3.FilterChain{Name: s.name, Filters: []*listenerv3.Filter{filter}, TransportSocket: tlsSocket(s.name, nil)}
		if len(names) > 0 {
			chain.FilterChainMatch = &listenerv3.FilterChainMatch{ServerNames: names}
		} else {
			refuse = false // it names no host: it is for every name
		}
		l.FilterChains = append(l.FilterChains, chain)
		refs = append(refs, Name{Secret, s.name})
	}
	if refuse {
		l.DefaultFilterChain = &listenerv3.FilterChain{Name: "unknown server name", Filters: []*listenerv3.Filter{filter}, TransportSocket: tlsSocket(secrets[0].name, impossible(secrets[0].pair))}
	}
	return refs
}

// impossible are TLS parameters under which no handshake with this key can
// succeed, so that the client is told by an alert.
func impossible(p *certs.Pair) *tlsv3.TlsParameters {
	cipher := "ECDHE-RSA-AES128-GCM-SHA256"
	if _, ok := p.Leaf.PublicKey.(*rsa.PublicKey); ok {
		cipher = "ECDHE-ECDSA-AES128-GCM-SHA256"
	}
	return &tlsv3.TlsParameters{TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_2, CipherSuites: []string{cipher}}
}

func tlsSocket(name string, params *tlsv3.TlsParameters) *corev3.TransportSocket {
	if params == nil {
		params = &tlsv3.TlsParameters{TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2}
	}
	context := &tlsv3.DownstreamTlsContext{CommonTlsContext: &tlsv3.CommonTlsContext{
		TlsParams: params, AlpnProtocols: []string{"h2", "http/1.1"},
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{Name: name, SdsConfig: fromADS(rdsTimeout)}},
	}}
	return &corev3.TransportSocket{Name: "envoy.transport_sockets.tls", ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(context)}}
}
