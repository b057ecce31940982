// Command issuer is a ZITADEL stand-in for tests. It uses the library of ZITADEL's own token endpoint, and
// adds only what docs/reference/zitadel-protocol.md describes.
//
//	issuer [--listen 127.0.0.1:0] [--tls] [--projection-lag 0s]
//
// It prints one JSON line, {"issuer":URL,"control":URL,"ca":PEM or ""}, and serves until its stdin
// reaches EOF. newControl lists the requests of the control port.
package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "issuer:", err)
		os.Exit(1)
	}
}

// announcement is the JSON line on stdout that tells a test the two addresses.
type announcement struct {
	Issuer  string `json:"issuer"`
	Control string `json:"control"`
	CA      string `json:"ca"`
}

// run serves until the context ends or stdin reaches EOF. Stdin closes when the test process ends, so that a
// killed test leaves no process behind.
func run(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	flags := flag.NewFlagSet("issuer", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:0", "address of the issuer port")
	secure := flags.Bool("tls", false, "serve https on the issuer port")
	lag := flags.Duration("projection-lag", 0, "delay until the token endpoint and reads of the API see a change of a user")
	if err := flags.Parse(args); err != nil {
		return err
	}
	host, _, err := net.SplitHostPort(*listen)
	if err != nil {
		return err
	}
	issuerPort, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	defer issuerPort.Close()
	controlPort, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer controlPort.Close()

	keys := newKeyMaker()
	users := newDirectory(settings{
		Dialect:          dialectInvalidGrant,
		ZitadelProjectID: "401085856582077478",
		LifetimeSeconds:  43200,
		ExternalDomain:   host,
		ExternalSecure:   *secure,

		ProjectionLagMillis:  lag.Milliseconds(),
		UserV2:               true,
		InternalPermissionV2: true,
	})
	front := &front{next: newIssuer(users, keys), users: users}

	said := announcement{
		Issuer:  users.settings().origin(issuerPort.Addr().String()),
		Control: "http://" + controlPort.Addr().String(),
	}
	if *secure {
		certificate, ca, err := newCertificate()
		if err != nil {
			return err
		}
		said.CA = ca
		issuerPort = tls.NewListener(issuerPort, &tls.Config{Certificates: []tls.Certificate{certificate}})
	}

	// HTTP/1.1 only: a reset fault must own its TCP connection.
	issuerServer := &http.Server{Handler: front}
	controlServer := &http.Server{Handler: newControl(users, keys, front)}
	failed := make(chan error, 2)
	go func() { failed <- issuerServer.Serve(issuerPort) }()
	go func() { failed <- controlServer.Serve(controlPort) }()
	defer issuerServer.Close()
	defer controlServer.Close()

	if err := json.NewEncoder(stdout).Encode(said); err != nil {
		return err
	}
	left := make(chan struct{})
	go func() {
		defer close(left)
		io.Copy(io.Discard, stdin)
	}()
	select {
	case <-ctx.Done():
		return nil
	case <-left:
		return nil
	case err := <-failed:
		return errors.Join(errors.New("a port stopped serving"), err)
	}
}
