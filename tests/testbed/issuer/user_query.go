package main

import (
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"
)

// GetUserByID and ListUsers of user v2 (docs/reference/zitadel-protocol.md#service-users).

// details are the dates of an object in a part of ZITADEL's API.
type details struct {
	Sequence      uint64 `json:"sequence,string"`
	ChangeDate    string `json:"changeDate"`
	ResourceOwner string `json:"resourceOwner"`
	CreationDate  string `json:"creationDate"`
}

func (u user) details() details {
	return details{u.sequence, timestamp(u.changed), u.organizationID, timestamp(u.created)}
}

// userAnswer is a user in an answer. Like all JSON of ZITADEL's API, it has no field with an empty value, so the
// default token type is absent.
type userAnswer struct {
	UserID             string         `json:"userId"`
	Details            details        `json:"details"`
	State              string         `json:"state"`
	Username           string         `json:"username"`
	LoginNames         []string       `json:"loginNames"`
	PreferredLoginName string         `json:"preferredLoginName"`
	Machine            *machineAnswer `json:"machine,omitempty"`
	Human              *humanAnswer   `json:"human,omitempty"`

	created time.Time
}

type machineAnswer struct {
	Name            string `json:"name,omitempty"`
	Description     string `json:"description,omitempty"`
	AccessTokenType string `json:"accessTokenType,omitempty"`
}

type humanAnswer struct {
	Profile struct {
		DisplayName string `json:"displayName,omitempty"`
	} `json:"profile"`
}

func (u userAnswer) order() (time.Time, string) { return u.created, u.UserID }

func (u user) answer() userAnswer {
	shown := userAnswer{
		UserID:             u.id,
		Details:            u.details(),
		State:              "USER_STATE_" + strings.ToUpper(u.State),
		Username:           u.Username,
		LoginNames:         []string{u.Username},
		PreferredLoginName: u.Username,
		created:            u.created,
	}
	if u.Human {
		shown.Human = &humanAnswer{}
		shown.Human.Profile.DisplayName = u.Name
		return shown
	}
	shown.Machine = &machineAnswer{Name: u.Name, Description: u.Description}
	if u.TokenType == tokenTypeJWT {
		shown.Machine.AccessTokenType = "ACCESS_TOKEN_TYPE_JWT"
	}
	return shown
}

// getUser is GetUserByID. An unknown user and a user that the caller may not see have different error ids.
func (m management) getUser(caller user, r *http.Request) (any, error) {
	u, err := m.users.projected(r.PathValue("id"))
	if err != nil {
		return nil, withID(codeNotFound, "QUERY-Dfbg2", "User could not be found")
	}
	if caller.id != u.id {
		if err := m.users.permit(caller.id, userRead, u.organizationID, u.id); err != nil {
			return nil, err
		}
	}
	return struct {
		Details details    `json:"details"`
		User    userAnswer `json:"user"`
	}{u.details(), u.answer()}, nil
}

// userQuery is one condition of ListUsers.
type userQuery struct {
	UserNameQuery       *nameQuery                       `json:"userNameQuery"`
	LoginNameQuery      *nameQuery                       `json:"loginNameQuery"`
	OrganizationIDQuery *struct{ OrganizationID string } `json:"organizationIdQuery"`
	InUserIDsQuery      *struct{ UserIDs []string }      `json:"inUserIdsQuery"`
	TypeQuery           *struct{ Type string }           `json:"typeQuery"`
}

// nameQuery compares one of the names that different messages have.
type nameQuery struct {
	UserName    string `json:"userName"`
	LoginName   string `json:"loginName"`
	Name        string `json:"name"`
	ProjectName string `json:"projectName"`
	Method      string `json:"method"`
}

// check refuses the comparisons that this program does not implement: a wrong list would be worse.
func (q nameQuery) check() error {
	if q.Method == "" || strings.HasSuffix(q.Method, "_METHOD_EQUALS") {
		return nil
	}
	return errors.New("the stand-in compares names with EQUALS only")
}

func (q userQuery) check() error {
	switch {
	case q == userQuery{}:
		return errors.New("the stand-in knows userNameQuery, loginNameQuery, organizationIdQuery, inUserIdsQuery and typeQuery only")
	case q.UserNameQuery != nil:
		return q.UserNameQuery.check()
	case q.LoginNameQuery != nil:
		return q.LoginNameQuery.check()
	}
	return nil
}

// matches reports whether a user fulfils the condition.
func (q userQuery) matches(u user) bool {
	switch {
	case q.UserNameQuery != nil:
		return u.Username == q.UserNameQuery.UserName
	case q.LoginNameQuery != nil:
		return u.Username == q.LoginNameQuery.LoginName
	case q.OrganizationIDQuery != nil:
		return u.organizationID == q.OrganizationIDQuery.OrganizationID
	case q.InUserIDsQuery != nil:
		return slices.Contains(q.InUserIDsQuery.UserIDs, u.id)
	}
	return u.Human == (q.TypeQuery.Type == "TYPE_HUMAN")
}

// listDetails describe a page in the older form of ZITADEL's lists.
type listDetails struct {
	TotalResult uint64 `json:"totalResult,string,omitempty"`
	Timestamp   string `json:"timestamp"`
}

// listUsers is ListUsers.
func (m management) listUsers(caller user, r *http.Request) (any, error) {
	var in struct {
		Query   paging      `json:"query"`
		Queries []userQuery `json:"queries"`
	}
	if err := fields(r, &in); err != nil {
		return nil, err
	}
	if err := in.Query.check(); err != nil {
		return nil, err
	}
	var rows []userAnswer
	users := m.users.projectedUsers()
	for _, query := range in.Queries {
		if err := query.check(); err != nil {
			return nil, err
		}
		users = slices.DeleteFunc(users, func(u user) bool { return !query.matches(u) })
	}
	for _, u := range users {
		rows = append(rows, u.answer())
	}
	part, total := page(in.Query, rows)
	visible := slices.DeleteFunc(part, func(u userAnswer) bool { return !m.mayRead(caller, u.UserID) })
	return struct {
		Details listDetails  `json:"details"`
		Result  []userAnswer `json:"result,omitempty"`
	}{listDetails{total.TotalResult, m.now()}, visible}, nil
}
