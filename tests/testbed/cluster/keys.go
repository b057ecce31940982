package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// keys are the credentials of the control plane and its only user. ECDSA, because RSA keys take seconds to generate.
type keys struct {
	ca    *x509.Certificate
	token string
}

func writeKeys(dir string) (*keys, error) {
	random := make([]byte, 16)
	if _, err := rand.Read(random); err != nil {
		return nil, err
	}
	now := time.Now()
	template := func(serial int64, name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
			BasicConstraintsValid: true,
		}
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := template(1, "testbed-ca")
	ca.IsCA, ca.KeyUsage = true, x509.KeyUsageCertSign
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	if ca, err = x509.ParseCertificate(caDER); err != nil {
		return nil, err
	}
	serverKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	server := template(2, "kube-apiserver")
	server.KeyUsage = x509.KeyUsageDigitalSignature
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	server.DNSNames = []string{"localhost", "kubernetes.default.svc"}
	server.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.ParseIP(nodeAddress)}
	serverDER, err := x509.CreateCertificate(rand.Reader, server, ca, serverKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	clientKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	client := template(3, "kube-apiserver")
	client.KeyUsage = x509.KeyUsageDigitalSignature
	client.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	clientDER, err := x509.CreateCertificate(rand.Reader, client, ca, clientKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	accountKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	for name, block := range map[string]func() (string, []byte, error){
		"ca.crt":              certificate(caDER),
		"server.crt":          certificate(serverDER),
		"server.key":          private(serverKey),
		"kubelet-client.crt":  certificate(clientDER),
		"kubelet-client.key":  private(clientKey),
		"service-account.key": private(accountKey),
	} {
		kind, der, err := block()
		if err != nil {
			return nil, err
		}
		text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return nil, err
		}
	}
	return &keys{ca: ca, token: hex.EncodeToString(random)}, nil
}

func certificate(der []byte) func() (string, []byte, error) {
	return func() (string, []byte, error) { return "CERTIFICATE", der, nil }
}

func private(key *ecdsa.PrivateKey) func() (string, []byte, error) {
	return func() (string, []byte, error) {
		der, err := x509.MarshalECPrivateKey(key)
		return "EC PRIVATE KEY", der, err
	}
}

func kubeconfig(server string, keys *keys) string {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: keys.ca.Raw})
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters:
- name: testbed
  cluster: {server: "%s", certificate-authority-data: "%s"}
users:
- name: admin
  user: {token: "%s"}
contexts:
- name: testbed
  context: {cluster: testbed, user: admin}
current-context: testbed
`, server, base64.StdEncoding.EncodeToString(ca), keys.token)
}
