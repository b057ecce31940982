package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// cgroups is a control group of this name in each hierarchy of the machine. With cgroup v2 there is one hierarchy.
type cgroups string

const hierarchies = "/sys/fs/cgroup"

func (name cgroups) paths() []string {
	if exists(filepath.Join(hierarchies, "cgroup.controllers")) {
		return []string{filepath.Join(hierarchies, string(name))}
	}
	var paths []string
	// Version 1 and its named hierarchies; runc enters all of them.
	roots, _ := filepath.Glob(filepath.Join(hierarchies, "*", "cgroup.procs"))
	for _, root := range roots {
		paths = append(paths, filepath.Join(filepath.Dir(root), string(name)))
	}
	return paths
}

func (name cgroups) make() error {
	paths := name.paths()
	if len(paths) == 0 {
		return errors.New("no control groups in " + hierarchies)
	}
	for _, path := range paths {
		// cpu and cpuacct may be one hierarchy with two names.
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

// remove removes the group and its children after their processes have ended.
func (name cgroups) remove() {
	for _, path := range name.paths() {
		var groups []string
		_ = filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				groups = append(groups, path)
			}
			return nil
		})
		for i := len(groups) - 1; i >= 0; i-- {
			// The kernel may need a moment after the last process has ended.
			for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				err := os.Remove(groups[i])
				if err == nil || errors.Is(err, fs.ErrNotExist) || time.Now().After(deadline) {
					break
				}
			}
		}
	}
}
