package main

import (
	"strings"
	"testing"
	"time"
)

var (
	noSuchUser  = errorBody(404, 5, "QUERY-Dfbg2", "User could not be found")
	userTaken   = errorBody(409, 6, "V3-DKcYh", "User already exists")
	userIDTaken = errorBody(400, 9, "COMMAND-k2una", "User already exists")
	noSuchOrg   = errorBody(400, 9, "COMMAND-QXPGs", "Organisation not found")
)

// newMachine is the body of CreateUser.
func newMachine(organization, username, more string) string {
	return `{"organizationId":"` + organization + `","username":"` + username + `","machine":{"name":"n"}` + more + `}`
}

// shownAs is the answer of GetUserByID for a user.
type shownAs struct{ User userAnswer }

func (s *stand) get(token, id string) userAnswer {
	s.t.Helper()
	var got shownAs
	decodeReply(s.t, s.call(token, "GET", "/v2/users/"+id, ""), &got)
	return got.User
}

// docs/reference/zitadel-protocol.md#service-users
func TestCreateUser(t *testing.T) {
	s := startWithOrganizations(t)
	admin := s.manager(onOrgA, "ORG_USER_MANAGER")
	var made struct {
		ID           string
		CreationDate time.Time
	}
	decodeReply(t, s.call(admin.token, "POST", "/v2/users/new",
		`{"organizationId":"`+orgA+`","username":"robot","machine":{"name":"Robot","description":"Shop","accessTokenType":"ACCESS_TOKEN_TYPE_JWT"},"metadata":[{"key":"k","value":"dg=="}]}`), &made)
	date := timestamp(made.CreationDate)
	details := `{"sequence":"1","changeDate":"` + date + `","resourceOwner":"` + orgA + `","creationDate":"` + date + `"}`
	expect(t, s.call(admin.token, "GET", "/v2/users/"+made.ID, ""), `200 {"details":`+details+`,"user":{"userId":"`+made.ID+`","details":`+details+
		`,"state":"USER_STATE_ACTIVE","username":"robot","loginNames":["robot"],"preferredLoginName":"robot","machine":{"name":"Robot","description":"Shop","accessTokenType":"ACCESS_TOKEN_TYPE_JWT"}}}`)
	expect(t, s.call(admin.token, "POST", "/v2/users/"+made.ID+"/metadata/search", `{}`), `200 {"pagination":{"appliedLimit":"100"}}`)

	for _, row := range []struct{ name, body, want string }{
		{"same username", newMachine(orgA, "robot", ""), userTaken},
		{"same id", newMachine(orgA, "other", `,"userId":"`+made.ID+`"`), userIDTaken},
		{"own id", newMachine(orgA, "chosen", `,"userId":"chosen"`), "200"},
		{"another organization", newMachine(orgB, "x", ""), notAMember},
		{"no organization", `{"machine":{"name":"n"}}`, `400 {"code":3,"message":"invalid CreateUserRequest.OrganizationId: value length must be between 1 and 200 runes, inclusive"}`},
		{"no name", `{"organizationId":"` + orgA + `","machine":{}}`,
			`400 {"code":3,"message":"invalid CreateUserRequest.Machine: embedded message failed validation | caused by: invalid CreateUserRequest_Machine.Name: value length must be between 1 and 200 runes, inclusive"}`},
	} {
		t.Run(row.name, func(t *testing.T) { expect(t, s.call(admin.token, "POST", "/v2/users/new", row.body), row.want) })
	}
	t.Run("over Connect", func(t *testing.T) {
		expect(t, s.rpc(admin.token, userService+"CreateUser", newMachine(orgA, "robot", "")), rpcError(409, "already_exists", "V3-DKcYh", "User already exists"))
	})
	t.Run("unknown organization", func(t *testing.T) {
		expect(t, s.call(s.caller(`{"administrator":true}`).token, "POST", "/v2/users/new", newMachine("1", "y", "")), noSuchOrg)
	})
	t.Run("the username defaults to the id", func(t *testing.T) {
		decodeReply(t, s.call(admin.token, "POST", "/v2/users/new", `{"organizationId":"`+orgA+`","machine":{"name":"n"}}`), &made)
		if got := s.get(admin.token, made.ID); got.Username != made.ID || got.Machine.AccessTokenType != "" {
			t.Errorf("%+v", got)
		}
	})
}

// docs/reference/zitadel-protocol.md#service-users
func TestUpdateUser(t *testing.T) {
	s := start(t)
	admin, me := s.caller(`{"administrator":true}`), s.caller(`{"username":"robot","name":"Robot"}`)
	s.newUser(`{"username":"taken"}`)
	path := "/v2/users/" + me.UserID
	change := func(token, body string) string {
		t.Helper()
		var said struct{ ChangeDate string }
		decodeReply(t, s.call(token, "PATCH", path, body), &said)
		return said.ChangeDate
	}
	for _, token := range []string{admin.token, me.token} {
		before := s.get(token, me.UserID)
		first := change(token, `{"machine":{"description":"by `+token+`"}}`)
		if again := change(token, `{"machine":{"description":"by `+token+`"}}`); again != first || first == before.Details.ChangeDate {
			t.Errorf("%s, %s, %s", before.Details.ChangeDate, first, again)
		}
	}
	change(admin.token, `{"username":"renamed","machine":{"name":"N","accessTokenType":"ACCESS_TOKEN_TYPE_JWT"}}`)
	got := s.get(me.token, me.UserID)
	if got.Username != "renamed" || got.Machine.Name != "N" || got.Machine.AccessTokenType != "ACCESS_TOKEN_TYPE_JWT" || !strings.HasPrefix(got.Machine.Description, "by ") {
		t.Errorf("%+v", got)
	}
	expect(t, s.call(admin.token, "PATCH", path, `{"username":"taken"}`), userTaken)
	expect(t, s.call(admin.token, "PATCH", "/v2/users/1", `{}`), errorBody(404, 5, "COMMAND-ugjs0upun6", "User could not be found"))
	expect(t, s.call(me.token, "PATCH", "/v2/users/"+admin.UserID, `{"machine":{"name":"N"}}`), notAMember)
}

// docs/reference/zitadel-protocol.md#permissions-of-callers
func TestWhoMayManageUsers(t *testing.T) {
	s := startWithOrganizations(t)
	const date = `{"expirationDate":"2100-01-01T00:00:00Z"}`
	for _, row := range []struct {
		name        string
		caller      own
		read, write string
	}{
		{"nobody", s.caller(`{}`), notAMember, notAMember},
		{"IAM_OWNER", s.manager(onInstance, "IAM_OWNER"), "200", "200"},
		{"IAM_USER_MANAGER", s.manager(onInstance, "IAM_USER_MANAGER"), "200", "200"},
		{"IAM_OWNER_VIEWER", s.manager(onInstance, "IAM_OWNER_VIEWER"), "200", noPermission},
		{"ORG_OWNER", s.manager(onOrgA, "ORG_OWNER"), "200", "200"},
		{"ORG_USER_MANAGER", s.manager(onOrgA, "ORG_USER_MANAGER"), "200", "200"},
		{"ORG_OWNER_VIEWER", s.manager(onOrgA, "ORG_OWNER_VIEWER"), "200", noPermission},
		{"ORG_SETTINGS_MANAGER", s.manager(onOrgA, "ORG_SETTINGS_MANAGER"), noPermission, noPermission},
		{"ORG_OWNER of another organization", s.manager(onOrgB, "ORG_OWNER"), notAMember, notAMember},
		{"PROJECT_OWNER", s.manager(onProject, "PROJECT_OWNER"), errorBody(403, 7, "AUTH-Swrgg2", "No matching permissions found"), noPermission},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := *s
			s.t = t
			id := s.newUser(`{"organizationId":"` + orgA + `"}`)
			key := s.newKey(id, `{}`)
			path := "/v2/users/" + id
			expect(t, s.call(row.caller.token, "GET", path, ""), row.read)
			for _, r := range []struct{ method, path, body string }{
				{"PATCH", path, `{"machine":{"name":"x"}}`},
				{"POST", path + "/keys", date},
				{"DELETE", path + "/keys/" + key.KeyID, ""},
				{"POST", path + "/pats", date},
				{"POST", path + "/metadata", `{"metadata":[{"key":"k","value":"dg=="}]}`},
				{"DELETE", path + "/metadata?keys=k", ""},
				{"POST", path + "/deactivate", `{}`},
				{"POST", path + "/reactivate", `{}`},
				{"POST", path + "/lock", `{}`},
				{"POST", path + "/unlock", `{}`},
				{"POST", "/v2/users/new", newMachine(orgA, "by-"+row.caller.UserID, "")},
				{"DELETE", path, ""},
			} {
				if got := s.call(row.caller.token, r.method, r.path, r.body); got.String() != row.write && (row.write != "200" || got.status != 200) {
					t.Errorf("%s %s: %s\nwant %s", r.method, r.path, got, row.write)
				}
			}
		})
	}
	t.Run("lists of keys and tokens", func(t *testing.T) {
		id, hidden := s.newUser(`{"organizationId":"`+orgA+`"}`), s.newUser(`{"organizationId":"`+orgB+`"}`)
		key := s.newKey(id, `{}`)
		s.newKey(hidden, `{}`)
		for _, user := range []string{id, hidden} {
			s.order("POST", "/users/"+user+"/pats", `{}`, nil)
		}
		viewer := s.manager(onOrgA, "ORG_OWNER_VIEWER")
		filter := func(id string) string { return `{"filters":[{"userIdFilter":{"id":"` + id + `"}}]}` }
		if all := viewer.list(keySearch, filter(id)); all.ids() != key.KeyID {
			t.Error(all.reply)
		}
		if all := viewer.list("/v2/users/pats/search", filter(id)); len(all.Result) != 1 || all.Pagination.TotalResult != "1" {
			t.Error(all.reply)
		}
		for _, path := range []string{keySearch, "/v2/users/pats/search"} {
			expect(t, viewer.call("POST", path, filter(hidden)), `200 {"pagination":{"totalResult":"1","appliedLimit":"100"}}`)
		}
	})
	t.Run("itself", func(t *testing.T) {
		me := s.caller(`{}`)
		path := "/v2/users/" + me.UserID
		expect(t, me.call("GET", path, ""), "200")
		expect(t, me.call("POST", path+"/deactivate", `{}`), notAMember)
		expect(t, me.call("DELETE", path, ""), notAMember)
	})
}

// An unknown user and a hidden user are both 404, so a client must read the error id
// (docs/reference/zitadel-protocol.md#api-errors).
func TestUnknownUser(t *testing.T) {
	s := start(t)
	admin, me := s.caller(`{"administrator":true}`), s.caller(`{}`)
	expect(t, admin.call("GET", "/v2/users/1", ""), noSuchUser)
	expect(t, me.call("GET", "/v2/users/1", ""), noSuchUser)
	expect(t, me.call("GET", "/v2/users/"+admin.UserID, ""), notAMember)
	expect(t, admin.call("DELETE", "/v2/users/1", ""), errorBody(404, 5, "COMMAND-bd4ir1mblj", "User could not be found"))
	expect(t, s.rpc(admin.token, userService+"GetUserByID", `{"userId":"1"}`), rpcError(404, "not_found", "QUERY-Dfbg2", "User could not be found"))

	expect(t, admin.call("DELETE", "/v2/users/"+me.UserID, ""), "200")
	expect(t, admin.call("GET", "/v2/users/"+me.UserID, ""), noSuchUser)
	expect(t, me.call("GET", "/v2/users/"+me.UserID, ""), badToken)
	expect(t, s.rpc(admin.token, remov, grant(me.UserID, onInstance)), "200 {}")
}

// docs/reference/zitadel-protocol.md#service-users
func TestListUsers(t *testing.T) {
	s := startWithOrganizations(t)
	admin := s.caller(`{"username":"root","administrator":true}`)
	manager := s.manager(onOrgA, "ORG_USER_MANAGER")
	me := s.caller(`{"username":"robot","organizationId":"` + orgA + `"}`)
	other := s.caller(`{"username":"other","organizationId":"` + orgB + `"}`)
	person := s.caller(`{"username":"person","organizationId":"` + orgB + `","human":true}`)
	for _, row := range []struct {
		name, query, total string
		caller             own
		ids                []string
	}{
		{"by username", `{"userNameQuery":{"userName":"robot","method":"TEXT_QUERY_METHOD_EQUALS"}}`, "1", admin, []string{me.UserID}},
		{"by login name", `{"loginNameQuery":{"loginName":"robot"}}`, "1", admin, []string{me.UserID}},
		{"by organization", `{"organizationIdQuery":{"organizationId":"` + orgB + `"}}`, "2", admin, []string{other.UserID, person.UserID}},
		{"by id", `{"inUserIdsQuery":{"userIds":["` + me.UserID + `","1"]}}`, "1", admin, []string{me.UserID}},
		{"by two queries", `{"typeQuery":{"type":"TYPE_MACHINE"}},{"userNameQuery":{"userName":"robot"}}`, "1", admin, []string{me.UserID}},
		{"people", `{"typeQuery":{"type":"TYPE_HUMAN"}}`, "1", admin, []string{person.UserID}},
		{"everyone", `{"typeQuery":{"type":"TYPE_MACHINE"}}`, "4", admin, []string{admin.UserID, manager.UserID, me.UserID, other.UserID}},
		{"own organization", `{"typeQuery":{"type":"TYPE_MACHINE"}}`, "4", manager, []string{manager.UserID, me.UserID}},
		{"without roles", `{"typeQuery":{"type":"TYPE_MACHINE"}}`, "4", me, []string{me.UserID}},
		{"a hidden user", `{"userNameQuery":{"userName":"root"}}`, "1", me, nil},
	} {
		t.Run(row.name, func(t *testing.T) {
			var all struct {
				Details struct{ TotalResult string }
				Result  []userAnswer
			}
			decodeReply(t, row.caller.call("POST", "/v2/users", `{"query":{"asc":true},"queries":[`+row.query+`]}`), &all)
			var ids []string
			for _, u := range all.Result {
				ids = append(ids, u.UserID)
			}
			if strings.Join(ids, " ") != strings.Join(row.ids, " ") || all.Details.TotalResult != row.total {
				t.Errorf("%+v", all)
			}
		})
	}
	for _, query := range []string{`{}`, `{"emailQuery":{"emailAddress":"a"}}`, `{"userNameQuery":{"userName":"r","method":"TEXT_QUERY_METHOD_STARTS_WITH"}}`} {
		if got := admin.call("POST", "/v2/users", `{"queries":[`+query+`]}`); got.status != 400 {
			t.Errorf("%s: %s", query, got)
		}
	}
}

// Reads of the API see a change late (docs/reference/zitadel-protocol.md#eventual-consistency).
func TestReadsOfUsersLag(t *testing.T) {
	const lag = 300 * time.Millisecond
	s := start(t, "--projection-lag", lag.String())
	id := s.newUser(`{"administrator":true}`)
	key := s.newKey(id, `{}`)
	s.order("GET", "/settled", "", nil)
	token := s.mint(key, zitadelScope).AccessToken

	changed := time.Now()
	inTime := func() bool { return time.Since(changed) < lag }
	var made struct{ ID string }
	decodeReply(t, s.call(token, "POST", "/v2/users/new", newMachine(defaultOrganizationID, "robot", "")), &made)
	path := "/v2/users/" + made.ID
	expect(t, s.call(token, "POST", path+"/metadata", `{"metadata":[{"key":"k","value":"dg=="}]}`), "200")
	expect(t, s.call(token, "POST", "/v2/users/new", newMachine(defaultOrganizationID, "robot", "")), userTaken)
	got := []reply{
		s.call(token, "GET", path, ""),
		s.call(token, "POST", "/v2/users", `{"queries":[{"userNameQuery":{"userName":"robot"}}]}`),
		s.call(token, "POST", path+"/metadata/search", `{}`),
	}
	if inTime() {
		expect(t, got[0], noSuchUser)
		for _, list := range got[1:] {
			if strings.Contains(list.body, "robot") || strings.Contains(list.body, "dg==") {
				t.Error("seen at once:", list)
			}
		}
	}
	s.order("GET", "/settled", "", nil)
	expect(t, s.call(token, "GET", path, ""), "200")
	if list := s.call(token, "POST", path+"/metadata/search", `{}`); !strings.Contains(list.body, "dg==") {
		t.Error(list)
	}
}
