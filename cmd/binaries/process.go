package binaries

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"time"
)

// pipeDelay bounds the wait for output of a child that has ended but whose pipe somebody still holds.
const pipeDelay = 2 * time.Second

// process is a started child. err is written before done is closed and read after.
type process struct {
	pid  int
	proc *os.Process
	done chan struct{}
	err  error
}

// startProcess starts cmd as a child that dies when this process dies and that terminal signals do not reach.
//
// The parent-death signal is bound to the thread that forked, not to the process, so the goroutine that starts the child
// keeps its thread until the child has ended.
func startProcess(cmd *exec.Cmd, ambientCaps bool) (*process, error) {
	cmd.SysProcAttr = sysProcAttr(ambientCaps)
	cmd.WaitDelay = pipeDelay
	p := &process{done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		err := cmd.Start()
		if err == nil {
			p.pid, p.proc = cmd.Process.Pid, cmd.Process
		}
		started <- err
		if err == nil {
			p.err = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		<-p.done
		return nil, fmt.Errorf("start: %w", err)
	}
	return p, nil
}

// signal sends sig; a child that has already ended is no error.
func (p *process) signal(sig os.Signal) error {
	if err := p.proc.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// ending says in words how the child ended; only after done.
func (p *process) ending() string {
	if p.err == nil {
		return "exit status 0"
	}
	return p.err.Error()
}
