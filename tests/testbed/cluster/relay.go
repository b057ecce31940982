package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// network is a network namespace. A socket stays in the namespace that its thread was in when the socket was created.
type network struct{ path string }

// ours is the network namespace of this process and the control plane.
var ours = network{"/proc/self/ns/net"}

// inside runs f on a thread in the namespace.
func (n network) inside(f func() error) error {
	done := make(chan error)
	go func() {
		// The thread is never unlocked, so it ends with the goroutine and no other goroutine runs in the namespace.
		runtime.LockOSThread()
		done <- func() error {
			file, err := os.Open(n.path)
			if err != nil {
				return err
			}
			defer file.Close()
			if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("%s: %w", n.path, err)
			}
			return f()
		}()
	}()
	return <-done
}

// relay forwards each connection from an address in one network to an address in another. The networks need no link, and
// a server needs only its loopback address. After Close, it accepts no more connections.
func relay(from network, listen string, to network, dial string) (io.Closer, error) {
	var listener net.Listener
	if err := from.inside(func() (err error) {
		listener, err = net.Listen("tcp", listen)
		return err
	}); err != nil {
		return nil, err
	}
	go func() {
		for {
			here, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				go carry(here, to, dial)
			}
		}
	}()
	return listener, nil
}

func carry(here net.Conn, to network, dial string) {
	defer here.Close()
	var there net.Conn
	if err := to.inside(func() (err error) {
		there, err = net.Dial("tcp", dial)
		return err
	}); err != nil {
		return
	}
	defer there.Close()
	both := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{here, there}, {there, here}} {
		go func() {
			_, _ = io.Copy(way[0], way[1])
			// The other direction stays open: an answer can follow the end of a request.
			_ = way[0].(*net.TCPConn).CloseWrite()
			both <- struct{}{}
		}()
	}
	<-both
	<-both
}
