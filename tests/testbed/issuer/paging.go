package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Page sizes of lists (docs/reference/zitadel-protocol.md#what-a-list-shows).
const (
	defaultLimit = 100
	maxLimit     = 1000
)

var errLimit = withID(codeInvalidArgument, "QUERY-4M0fs", "Limit exceeded")

// paging is the request for a page of a list.
type paging struct {
	Offset protoUint `json:"offset"`
	Limit  protoUint `json:"limit"`
	Asc    bool      `json:"asc"`
}

func (p paging) limit() uint64 { return cmp.Or(uint64(p.Limit), defaultLimit) }

func (p paging) check() error {
	if p.limit() > maxLimit {
		return errLimit
	}
	return nil
}

// pagination is the description of a page in an answer. Like all JSON of ZITADEL's API, it has no field with an
// empty value.
type pagination struct {
	TotalResult  uint64 `json:"totalResult,string,omitempty"`
	AppliedLimit uint64 `json:"appliedLimit,string"`
}

// entry is an entry of a list. Lists are sorted by creation date, then by id.
type entry interface{ order() (time.Time, string) }

// page returns the requested part of the rows. ZITADEL counts and pages before it drops what the caller may not see,
// so callers drop afterwards (docs/reference/zitadel-protocol.md#what-a-list-shows).
func page[T entry](p paging, rows []T) ([]T, pagination) {
	slices.SortFunc(rows, func(a, b T) int {
		createdA, idA := a.order()
		createdB, idB := b.order()
		order := cmp.Or(createdA.Compare(createdB), cmp.Compare(idA, idB))
		if p.Asc {
			return order
		}
		return -order
	})
	start := min(uint64(p.Offset), uint64(len(rows)))
	part := rows[start:min(start+p.limit(), uint64(len(rows)))]
	described := pagination{AppliedLimit: p.limit()}
	if len(part) > 0 { // the database counts in the rows of the page
		described.TotalResult = uint64(len(rows))
	}
	return part, described
}

// keep returns the rows that fulfil a condition.
func keep[T any](rows []T, fulfils func(T) bool) []T {
	return slices.DeleteFunc(rows, func(row T) bool { return !fulfils(row) })
}

// protoUint is an unsigned integer of a protobuf message: in JSON a number or a string
// (https://protobuf.dev/programming-guides/json/).
type protoUint uint64

func (n *protoUint) UnmarshalJSON(text []byte) error {
	if string(text) == "null" {
		return nil
	}
	parsed, err := strconv.ParseUint(strings.Trim(string(text), `"`), 10, 64)
	if err != nil {
		return fmt.Errorf("proto: invalid value for an unsigned field: %s", text)
	}
	*n = protoUint(parsed)
	return nil
}
