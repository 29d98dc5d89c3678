// Package binaries has one job: the real Envoy and the real Consul as processes of this host, and the Python gRPC client
// that tests call through. It finds them, fetches or builds what is missing into the user's cache, and runs them.
//
// In goes a request for a program (EnvoyOptions, ConsulOptions, GRPCIOOptions) or a process (SupervisorConfig, a command); out comes a
// checked Program, a Supervisor that keeps one Envoy alive, or a Process. [EnvoyForTest], [ConsulForTest], [GRPCIOForTest],
// [StartEnvoy] and [StartConsul] are the same for tests, which take them as a [TB].
//
// Goroutines: one per child process, locked to its thread, that starts the child and waits for it. Supervisor.Run and
// Process.Stop return only after theirs has ended. Nothing else is left running.
package binaries
