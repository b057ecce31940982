package main

import (
	"bytes"
	"errors"
	"net/http"
	"time"
)

// Metadata of users in user v2 (docs/reference/zitadel-protocol.md#metadata-of-users).

// metadataValue is the value of a key and its dates.
type metadataValue struct {
	value   []byte
	created time.Time
	changed time.Time
}

var (
	errNoData      = withID(codeFailed, "META-9mm2d", "Errors.Metadata.NoData")
	errBadMetadata = withID(codeInvalidArgument, "META-2m00f", "Errors.Metadata.Invalid")
	errNoMetadata  = errors.New("the user has no such metadata")
	errNoSuchUser  = withID(codeFailed, "COMMAND-uXHNj", "User could not be found")
	errFilter      = errors.New("the stand-in knows keyFilter with EQUALS only")
)

// setMetadata sets keys, and returns the date of the last change. An equal value is no change.
func (d *directory) setMetadata(userID string, values map[string][]byte) (changed time.Time, err error) {
	err = d.edit(userID, func(u *user) error {
		now := d.now()
		for key, value := range values {
			if key == "" || len(value) == 0 {
				return errBadMetadata
			}
			old, found := u.metadata[key]
			if found && bytes.Equal(old.value, value) {
				continue
			}
			if !found {
				old.created = now
			}
			u.metadata[key] = metadataValue{value, old.created, now}
		}
		for _, kept := range u.metadata {
			if kept.changed.After(changed) {
				changed = kept.changed
			}
		}
		return nil
	})
	return changed, err
}

// deleteMetadata removes all keys, or none.
func (d *directory) deleteMetadata(userID string, keys []string) error {
	return d.edit(userID, func(u *user) error {
		for _, key := range keys {
			if err := remove(u.metadata, key, errNoMetadata); err != nil {
				return err
			}
		}
		return nil
	})
}

// mayWriteMetadata refuses a caller who may not change the metadata of a user, or an unknown user.
func (m management) mayWriteMetadata(caller user, id string) error {
	if _, err := m.users.user(id); err != nil {
		return errNoSuchUser
	}
	return m.mayManage(caller, id)
}

// setMetadata is SetUserMetadata.
func (m management) setMetadata(caller user, r *http.Request) (any, error) {
	var in struct {
		Metadata []struct {
			Key   string     `json:"key"`
			Value protoBytes `json:"value"`
		} `json:"metadata"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if len(in.Metadata) == 0 {
		return nil, errNoData
	}
	if err := m.mayWriteMetadata(caller, r.PathValue("id")); err != nil {
		return nil, err
	}
	values := map[string][]byte{}
	for _, entry := range in.Metadata {
		values[entry.Key] = entry.Value
	}
	changed, err := m.users.setMetadata(r.PathValue("id"), values)
	return map[string]string{"setDate": timestamp(changed)}, err
}

// deleteMetadata is DeleteUserMetadata. REST has the keys in the query, Connect in the body.
func (m management) deleteMetadata(caller user, r *http.Request) (any, error) {
	var in struct {
		Keys []string `json:"keys"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	keys := append(in.Keys, r.URL.Query()["keys"]...)
	if len(keys) == 0 {
		return nil, errNoData
	}
	if err := m.mayWriteMetadata(caller, r.PathValue("id")); err != nil {
		return nil, err
	}
	return map[string]string{"deletionDate": m.now()}, m.users.deleteMetadata(r.PathValue("id"), keys)
}

// metadataRow is a key in a list.
type metadataRow struct {
	CreationDate string `json:"creationDate"`
	ChangeDate   string `json:"changeDate"`
	Key          string `json:"key"`
	Value        []byte `json:"value"`

	created time.Time
}

func (r metadataRow) order() (time.Time, string) { return r.created, r.Key }

// listMetadata is ListUserMetadata. The list is empty for an unknown user and for a user that the caller may not see.
func (m management) listMetadata(caller user, r *http.Request) (any, error) {
	var in struct {
		Pagination paging `json:"pagination"`
		Filters    []struct {
			KeyFilter *struct {
				Key    string `json:"key"`
				Method string `json:"method"`
			} `json:"keyFilter"`
		} `json:"filters"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if err := in.Pagination.check(); err != nil {
		return nil, err
	}
	u, _ := m.users.projected(r.PathValue("id"))
	var rows []metadataRow
	for key, value := range u.metadata {
		rows = append(rows, metadataRow{timestamp(value.created), timestamp(value.changed), key, value.value, value.created})
	}
	for _, filter := range in.Filters {
		if filter.KeyFilter == nil || (nameQuery{Method: filter.KeyFilter.Method}).check() != nil {
			return nil, errFilter
		}
		rows = keep(rows, func(row metadataRow) bool { return row.Key == filter.KeyFilter.Key })
	}
	part, total := page(in.Pagination, rows)
	part = keep(part, func(metadataRow) bool { return m.mayRead(caller, u.id) })
	return struct {
		Pagination pagination    `json:"pagination"`
		Metadata   []metadataRow `json:"metadata,omitempty"`
	}{total, part}, nil
}
