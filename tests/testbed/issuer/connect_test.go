package main

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"testing"
)

const (
	userService    = "/zitadel.user.v2.UserService/"
	orgService     = "/zitadel.org.v2.OrganizationService/"
	projectService = "/zitadel.project.v2.ProjectService/"
	adminService   = "/zitadel.internal_permission.v2.InternalPermissionService/"
)

// rpc sends a request over Connect.
func (s *stand) rpc(token, path, body string) reply {
	s.t.Helper()
	header := http.Header{"Content-Type": {"application/json"}}
	if token != "" {
		header.Set("Authorization", "Bearer "+token)
	}
	return s.must("POST", s.Issuer+path, header, body)
}

// rpcError is the text of an error answer over Connect.
func rpcError(status int, code, id, message string) string {
	detail := fmt.Sprintf("\x0a%c%s\x12%c%s", len(id), id, len(message), message)
	return fmt.Sprintf(`%d {"code":"%s","message":"%s (%s)","details":[{"type":"zitadel.v1.ErrorDetail","value":"%s","debug":{"id":"%s","message":"%s"}}]}`,
		status, code, message, id, base64.RawStdEncoding.EncodeToString([]byte(detail)), id, message)
}

var (
	rpcNotAMember   = rpcError(404, "not_found", "AUTHZ-cdgFk", "membership not found")
	rpcNoPermission = rpcError(403, "permission_denied", "AUTH-AWfge", "No matching permissions found")
	rpcElsewhere    = rpcError(403, "permission_denied", "AUTH-Swrgg2", "No matching permissions found")
)

const (
	rpcAbsent  = "404 404 page not found"
	rpcNoToken = `401 {"code":"unauthenticated","message":"auth header missing"}`
)

// docs/reference/zitadel-protocol.md#connect
func TestConnect(t *testing.T) {
	s := start(t)
	me := s.own(`{}`)
	path := adminService + "CreateAdministrator"
	const body = `{"userId":"1","resource":{"instance":true},"roles":["IAM_OWNER"],"unknown":1}`
	const literal = `404 {"code":"not_found","message":"membership not found (AUTHZ-cdgFk)","details":[{"type":"zitadel.v1.ErrorDetail",` +
		`"value":"CgtBVVRIWi1jZGdGaxIUbWVtYmVyc2hpcCBub3QgZm91bmQ","debug":{"id":"AUTHZ-cdgFk","message":"membership not found"}}]}`
	expect(t, s.rpc(me.token, path, body), literal)
	expect(t, s.rpc("", path, body), rpcNoToken)
	expect(t, s.rpc("x", path, body), rpcError(401, "unauthenticated", "AUTH-7fs1e", "Errors.Token.Invalid"))
	expect(t, s.rpc(me.token, adminService+"GrantAdministrator", body), rpcAbsent)
	expect(t, s.call(me.token, "GET", path, ""), "405 ")
	expect(t, s.must("POST", s.Issuer+path, http.Header{"Content-Type": {"text/plain"}}, body), "415 ")
	if got := s.rpc(me.token, path, `{`); got.status != 400 {
		t.Error(got)
	}
	got := s.must("POST", s.Issuer+path, http.Header{"Host": {"other"}, "Content-Type": {"application/json"}}, body)
	if got.status != 404 || got.header.Get("Content-Type") != "application/json" {
		t.Error(got)
	}
}

// Methods of user v2 have the same answers over REST and Connect (docs/reference/zitadel-protocol.md#connect).
func TestUserV2OverConnect(t *testing.T) {
	s := start(t)
	me, other := s.own(`{}`), s.own(`{}`)
	var made keyAnswer
	decodeReply(t, s.rpc(me.token, userService+"AddKey", `{"userId":"`+me.UserID+`","expirationDate":"2100-01-01T00:00:00Z"}`), &made)
	expect(t, s.rpc(me.token, userService+"AddKey", `{"userId":"`+other.UserID+`","expirationDate":"2100-01-01T00:00:00Z"}`), rpcNotAMember)
	if all := me.mine(); all.ids() != me.KeyID+" "+made.KeyID {
		t.Error(all.reply)
	}
	expect(t, s.rpc(me.token, userService+"ListKeys", `{"filters":[{"userIdFilter":{"id":"1"}}]}`), `200 {"pagination":{"appliedLimit":"100"}}`)
	removal := `{"userId":"` + me.UserID + `","keyId":"` + made.KeyID + `"}`
	expect(t, s.rpc(me.token, userService+"RemoveKey", removal), "200")
	expect(t, s.rpc(me.token, userService+"RemoveKey", removal), rpcError(404, "not_found", "COMMAND-4m77G", "Machine key not found"))
}

// docs/reference/zitadel-protocol.md#versions-of-services
func TestServicesOfOlderVersions(t *testing.T) {
	s := start(t)
	admin := s.own(`{"administrator":true}`)
	id := admin.UserID
	list := `{}`
	for _, row := range []struct{ settings, users, administrators, projects string }{
		{`{}`, "200", "200", "200"},
		{`{"internalPermissionV2":false}`, "200", rpcAbsent, rpcAbsent},
		{`{"userV2":false}`, rpcAbsent, rpcAbsent, rpcAbsent},
	} {
		s.order("PATCH", "/settings", row.settings, nil)
		expect(t, s.rpc(admin.token, userService+"ListUserMetadata", `{"userId":"`+id+`"}`), row.users)
		expect(t, s.rpc(admin.token, adminService+"ListAdministrators", list), row.administrators)
		expect(t, s.rpc(admin.token, projectService+"ListProjects", list), row.projects)
		// ZITADEL 3 has these too.
		expect(t, s.call(admin.token, "GET", "/v2/users/"+id, ""), "200")
		expect(t, s.call(admin.token, "POST", "/v2/users", list), "200")
		expect(t, s.call(admin.token, "POST", "/v2/organizations/_search", list), "200")
	}
	expect(t, s.call(admin.token, "POST", "/v2/users/"+id+"/metadata", `{}`), `404 {"code":5,"message":"Not Found"}`)
}
