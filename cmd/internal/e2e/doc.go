// Package e2e holds the tests that run Roost as its users do: the built binary,
// real Envoys, a real Consul, and hosts that are network namespaces. It has no
// code of its own.
package e2e
