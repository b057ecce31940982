package main

import (
	"context"
	"net/http"

	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// UserInfo returns the user of an access token with any audience and any scopes. The stand-in adds no claims for scopes
// (docs/reference/zitadel-protocol.md#user-info).
func (i *issuer) UserInfo(ctx context.Context, r *op.Request[oidc.UserInfoRequest]) (*op.Response, error) {
	session, err := i.users.session(r.Data.AccessToken)
	if err != nil || !session.isFrom(op.IssuerFromContext(ctx)) {
		return nil, op.NewStatusError(oidc.ErrAccessDenied().WithDescription("access token invalid"), http.StatusUnauthorized)
	}
	return op.NewResponse(&oidc.UserInfo{Subject: session.userID}), nil
}
