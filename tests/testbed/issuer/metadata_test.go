package main

import (
	"testing"
)

// docs/reference/zitadel-protocol.md#metadata-of-users
func TestMetadata(t *testing.T) {
	s := start(t)
	admin, nobody := s.caller(`{"administrator":true}`), s.caller(`{}`)
	id := s.newUser(`{}`)
	path := "/v2/users/" + id + "/metadata"
	set := func(body string) string {
		t.Helper()
		var said struct{ SetDate string }
		decodeReply(t, admin.call("POST", path, body), &said)
		return said.SetDate
	}
	first := set(`{"metadata":[{"key":"owner","value":"YQ=="}]}`)
	second := set(`{"metadata":[{"key":"owner","value":"Yg=="},{"key":"uid","value":"MQ=="}]}`)
	if again := set(`{"metadata":[{"key":"owner","value":"Yg=="}]}`); again != second || first == second {
		t.Errorf("%s, %s, %s", first, second, again)
	}
	owner := `{"creationDate":"` + first + `","changeDate":"` + second + `","key":"owner","value":"Yg=="}`
	only := `200 {"pagination":{"totalResult":"1","appliedLimit":"100"},"metadata":[` + owner + `]}`
	expect(t, admin.call("POST", path+"/search", `{"filters":[{"keyFilter":{"key":"owner","method":"TEXT_FILTER_METHOD_EQUALS"}}]}`), only)
	expect(t, s.rpc(admin.token, userService+"ListUserMetadata", `{"userId":"`+id+`","filters":[{"keyFilter":{"key":"owner"}}]}`), only)
	expect(t, admin.call("POST", path+"/search", `{"pagination":{"asc":true,"limit":1}}`), `200 {"pagination":{"totalResult":"2","appliedLimit":"1"},"metadata":[`+owner+`]}`)
	expect(t, nobody.call("POST", path+"/search", `{}`), `200 {"pagination":{"totalResult":"2","appliedLimit":"100"}}`)
	expect(t, nobody.call("POST", path, `{"metadata":[{"key":"owner","value":"YQ=="}]}`), notAMember)

	for _, row := range []struct{ name, method, path, body, want string }{
		{"nothing to set", "POST", path, `{}`, errorBody(400, 9, "META-9mm2d", "Errors.Metadata.NoData")},
		{"empty value", "POST", path, `{"metadata":[{"key":"k","value":""}]}`, errorBody(400, 3, "META-2m00f", "Errors.Metadata.Invalid")},
		{"unknown user", "POST", "/v2/users/1/metadata", `{"metadata":[{"key":"k","value":"YQ=="}]}`, errorBody(400, 9, "COMMAND-uXHNj", "User could not be found")},
		{"one key of two unknown", "DELETE", path + "?keys=owner&keys=x", "", errorBody(404, 5, "META-2nnds", "Errors.Metadata.KeyNotExisting")},
		{"nothing to delete", "DELETE", path, "", errorBody(400, 9, "META-9mm2d", "Errors.Metadata.NoData")},
		{"delete", "DELETE", path + "?keys=owner", "", "200"},
		{"deleted", "DELETE", path + "?keys=owner", "", errorBody(404, 5, "META-2nnds", "Errors.Metadata.KeyNotExisting")},
	} {
		t.Run(row.name, func(t *testing.T) { expect(t, admin.call(row.method, row.path, row.body), row.want) })
	}
	expect(t, s.rpc(admin.token, userService+"DeleteUserMetadata", `{"userId":"`+id+`","keys":["uid"]}`), "200")
	var shown shownUser
	if s.order("GET", "/users/"+id, "", &shown); len(shown.Metadata) != 0 {
		t.Errorf("%+v", shown)
	}
}
