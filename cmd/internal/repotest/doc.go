// Package repotest holds the house rules as tests: who may import whom, what the
// map says, how large a file may grow. It has no code of its own.
package repotest
