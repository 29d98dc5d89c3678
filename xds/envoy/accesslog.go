package envoy

import (
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	streamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/roostmesh/roost/lb"
)

const firstServerError = 500

var (
	commonFields = map[string]string{
		"time": "%START_TIME%", "tenant": "%METADATA(CLUSTER:roost:tenant)%", "service": "%METADATA(CLUSTER:roost:service)%",
		"cluster": "%UPSTREAM_CLUSTER_RAW%", "endpoint": "%UPSTREAM_HOST%", "flags": "%RESPONSE_FLAGS%",
		"client": "%DOWNSTREAM_REMOTE_ADDRESS%", "address": "%DOWNSTREAM_LOCAL_ADDRESS%", "duration_ms": "%DURATION%",
		"bytes_in": "%BYTES_RECEIVED%", "bytes_out": "%BYTES_SENT%", "failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
	}
	httpFields = map[string]string{
		"route": "%ROUTE_NAME%", "request_id": "%REQ(X-REQUEST-ID)%", "method": "%REQ(:METHOD)%", "host": "%REQ(:AUTHORITY)%", "path": "%REQ(:PATH)%",
		"status": "%RESPONSE_CODE%", "details": "%RESPONSE_CODE_DETAILS%", "reason": "%RESP(X-ROOST-REASON)%", "attempts": "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
	}
)

const (
	httpText = "%START_TIME% %METADATA(CLUSTER:roost:tenant)%/%METADATA(CLUSTER:roost:service)% route=%ROUTE_NAME% cluster=%UPSTREAM_CLUSTER_RAW% endpoint=%UPSTREAM_HOST% %REQ(:METHOD)% %REQ(:AUTHORITY)%%REQ(:PATH)% %RESPONSE_CODE% flags=%RESPONSE_FLAGS% %DURATION%ms id=%REQ(X-REQUEST-ID)%\n"
	tcpText  = "%START_TIME% %METADATA(CLUSTER:roost:tenant)%/%METADATA(CLUSTER:roost:service)% cluster=%UPSTREAM_CLUSTER_RAW% endpoint=%UPSTREAM_HOST% tcp %DOWNSTREAM_REMOTE_ADDRESS% flags=%RESPONSE_FLAGS% %DURATION%ms\n"
)

// accessLog writes to Envoy's standard output: everything where the proxy's
// role says so, else only what went wrong. service is what one TCP listener
// serves, for connections that never reached a cluster.
func accessLog(c lb.AccessLog, role lb.Role, http bool, tenant, service string) []*accesslogv3.AccessLog {
	all := c.Proxies == "all" || role == lb.Gateway
	if c.Format == "none" || !all && c.Errors == "none" {
		return nil
	}
	format := &corev3.SubstitutionFormatString{}
	if c.Format == "text" {
		line := tcpText
		if http {
			line = httpText
		}
		format.Format = &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: line}}}
	} else {
		format.Format = &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: jsonFormat(http, tenant, service)}
	}
	log := &accesslogv3.AccessLog{Name: "envoy.access_loggers.stdout", ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: pack(&streamv3.StdoutAccessLog{
		AccessLogFormat: &streamv3.StdoutAccessLog_LogFormat{LogFormat: format},
	})}}
	if !all {
		log.Filter = onlyErrors(http)
	}
	return []*accesslogv3.AccessLog{log}
}

func jsonFormat(http bool, tenant, service string) *structpb.Struct {
	s := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for k, v := range commonFields {
		s.Fields[k] = structpb.NewStringValue(v)
	}
	if http {
		for k, v := range httpFields {
			s.Fields[k] = structpb.NewStringValue(v)
		}
	}
	if service != "" {
		s.Fields["tenant"], s.Fields["service"] = structpb.NewStringValue(tenant), structpb.NewStringValue(service)
	}
	return s
}

// onlyErrors lets Envoy's own answers, server errors, and TCP connections that
// were refused or reset pass.
func onlyErrors(http bool) *accesslogv3.AccessLogFilter {
	flags := &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ResponseFlagFilter{ResponseFlagFilter: &accesslogv3.ResponseFlagFilter{}}}
	if !http {
		return flags
	}
	status := &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_StatusCodeFilter{StatusCodeFilter: &accesslogv3.StatusCodeFilter{
		Comparison: &accesslogv3.ComparisonFilter{Op: accesslogv3.ComparisonFilter_GE, Value: &corev3.RuntimeUInt32{DefaultValue: firstServerError, RuntimeKey: "roost.access_log.status"}},
	}}}
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_OrFilter{OrFilter: &accesslogv3.OrFilter{Filters: []*accesslogv3.AccessLogFilter{flags, status}}}}
}
