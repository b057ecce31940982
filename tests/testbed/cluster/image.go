package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
)

// busyboxImage is the image of the tests' pods and of pod sandboxes, because the node cannot pull images.
const busyboxImage = "docker.io/library/busybox:testbed"

// findBusybox returns the path of a statically linked busybox.
func findBusybox() (string, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return "", err
	}
	file, err := elf.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	for _, program := range file.Progs {
		if program.Type == elf.PT_INTERP {
			return "", errors.New("busybox is dynamically linked")
		}
	}
	return path, nil
}

// writeBusyboxImage writes an OCI archive with one layer (github.com/opencontainers/image-spec, image-layout.md). By
// default its container sleeps.
func writeBusyboxImage(file, busybox string) error {
	binary, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return err
	}
	layer, err := archive(func(out *tar.Writer) error {
		if err := add(out, "bin/busybox", 0o755, binary); err != nil {
			return err
		}
		for _, applet := range strings.Fields(string(applets)) {
			if applet == "busybox" {
				continue
			}
			link := &tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + applet, Linkname: "busybox", Mode: 0o777}
			if err := out.WriteHeader(link); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	type object = map[string]any
	blobs := map[string][]byte{}
	blob := func(kind string, content []byte) object {
		digest := fmt.Sprintf("%x", sha256.Sum256(content))
		blobs[digest] = content
		return object{"mediaType": "application/vnd.oci.image." + kind, "digest": "sha256:" + digest, "size": len(content)}
	}
	document := func(content object) []byte {
		text, _ := json.Marshal(content) // strings, numbers, lists and maps of them
		return text
	}
	layers := blob("layer.v1.tar", layer)
	config := blob("config.v1+json", document(object{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": object{"Env": []string{"PATH=/bin"}, "Cmd": []string{"/bin/sleep", "inf"}},
		"rootfs": object{"type": "layers", "diff_ids": []any{layers["digest"]}},
	}))
	manifest := blob("manifest.v1+json", document(object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config, "layers": []object{layers},
	}))
	image, err := archive(func(out *tar.Writer) error {
		if err := add(out, "oci-layout", 0o644, document(object{"imageLayoutVersion": "1.0.0"})); err != nil {
			return err
		}
		index := document(object{"schemaVersion": 2, "manifests": []object{manifest}})
		if err := add(out, "index.json", 0o644, index); err != nil {
			return err
		}
		for digest, content := range blobs {
			if err := add(out, "blobs/sha256/"+digest, 0o644, content); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return os.WriteFile(file, image, 0o600)
}

func archive(fill func(*tar.Writer) error) ([]byte, error) {
	var out bytes.Buffer
	writer := tar.NewWriter(&out)
	if err := fill(writer); err != nil {
		return nil, err
	}
	err := writer.Close()
	return out.Bytes(), err
}

func add(out *tar.Writer, name string, mode int64, content []byte) error {
	header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}
	if err := out.WriteHeader(header); err != nil {
		return err
	}
	_, err := out.Write(content)
	return err
}
