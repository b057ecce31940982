//! Cases that need controls of the stand-in (lifetimes at run time, the older error dialect, a wrong clock, another
//! domain, TLS with an unknown CA, faults) or its request recorder. `make test-zitadel` leaves this file out.

mod administration;

use std::io::ErrorKind;
use std::net::TcpListener;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use zitadel_tokens::domain::answer::{Expected, Minted, accept};
use zitadel_tokens::domain::failure::{Failure, classify};
use zitadel_tokens::domain::key::{self, ServiceKey};
use zitadel_tokens::domain::reason::Reason;
use zitadel_tokens::zitadel::{Settings, ZitadelClient};

use super::client::{connect, exchange, expected, mint, scope, settings};
use super::support::issuer::{Issuer, Recorded};
use super::support::world::{PROJECT, claims};

pub const DISCOVERY: &str = "/.well-known/openid-configuration";
pub const TOKEN: &str = "/oauth/v2/token";

const TEN_YEARS: i64 = 10 * 365 * 24 * 3600;

/// Lifetime of a token in seconds, ZITADEL's default.
const LIFETIME: i64 = 12 * 3600;

/// A stand-in with one user whose tokens are JWTs, and a client for it.
pub struct World {
    pub issuer: Issuer,
    pub key: ServiceKey,
    pub instance: ZitadelClient,
}

impl World {
    pub async fn new() -> Self {
        Self::with(settings).await
    }

    pub async fn with(settings: impl FnOnce(&str) -> Settings) -> Self {
        let issuer = Issuer::start(&[]);
        let key = user(&issuer, "JWT").await;
        let instance = connect(settings(&issuer.url));
        Self { issuer, key, instance }
    }

    /// What a token for [`PROJECT`] must contain.
    fn expected(&self) -> Expected {
        expected(&self.instance, &self.key, &json!({"projectIDs": [PROJECT]}), "unused")
    }

    /// Requests a token for [`PROJECT`] without learning the project id of the ZITADEL API first.
    pub async fn mint(&self) -> Result<Minted, Reason> {
        self.mint_by(&self.instance).await
    }

    /// The same with another client.
    async fn mint_by(&self, instance: &ZitadelClient) -> Result<Minted, Reason> {
        let scope = scope(&json!({"projectIDs": [PROJECT]}));
        let got = exchange(instance, &self.key, &scope).await?;
        accept(got.answer, &self.expected(), got.sent)
    }

    /// Sets the server's clock this many seconds ahead.
    async fn clock(&self, seconds: i64) {
        self.issuer.settings(json!({"clockOffsetMillis": seconds * 1000})).await;
    }

    /// The outcome of a token request that is answered with 200 and this body.
    pub async fn judge(&self, body: impl Into<String>) -> Result<Minted, Reason> {
        self.issuer
            .fault(json!({"path": TOKEN, "times": 1, "status": 200, "body": body.into()}))
            .await;
        self.mint().await
    }

    pub async fn token_requests(&self) -> Vec<Recorded> {
        token_requests(&self.issuer).await
    }
}

pub async fn user(issuer: &Issuer, kind: &str) -> ServiceKey {
    let user = issuer.user(json!({"tokenType": kind})).await;
    key::parse(user.key.as_bytes()).expect("a key file")
}

async fn token_requests(issuer: &Issuer) -> Vec<Recorded> {
    let all = issuer.requests().await;
    all.into_iter().filter(|r| r.path == TOKEN).collect()
}

/// Another server that must not receive any request.
struct Elsewhere(TcpListener);

impl Elsewhere {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("set");
        Self(listener)
    }

    fn url(&self) -> String {
        format!("http://{}", self.0.local_addr().expect("an address"))
    }

    /// Asserts that nobody connected. Call it after the request under test has returned: a connection made until then
    /// is in the accept queue.
    fn assert_untouched(&self) {
        let outcome = self.0.accept();
        assert!(
            outcome.as_ref().is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
            "{outcome:?}"
        );
    }
}

/// The stand-in refuses self-management where a server's policy would, and shows a test whose keys exist and who called
/// (docs/reference/zitadel-protocol.md#self-management-of-keys).
#[tokio::test]
async fn self_management_of_keys_can_be_refused() {
    let world = World::new().await;
    let user = world.key.user_id.as_str();
    let scope = scope(&json!({"zitadelAPI": true, "scopes": []}));
    let token = exchange(&world.instance, &world.key, &scope).await.expect("a token");
    let path = format!("/v2/users/{user}/keys");
    let add = async || {
        let request = reqwest::Client::new().post(format!("{}{path}", world.issuer.url));
        let request = request.bearer_auth(token.answer.access_token.expose_secret());
        let answer = request.json(&json!({"expirationDate": "2100-01-01T00:00:00.123456Z"}));
        let answer = answer.send().await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"))
    };
    for (refused, status) in [(false, 200), (true, 403), (false, 200)] {
        world.issuer.refuse_self_management(user, refused).await;
        let (got, body) = add().await;
        assert_eq!(got, status, "{body}");
        if refused {
            assert_eq!(body["details"][0]["id"], "AUTH-AWfge");
        }
    }
    let keys = world.issuer.keys(user).await;
    let dates: Vec<_> = keys.iter().map(|key| key.expiration_date.as_str()).collect();
    let added = "2100-01-01T00:00:00.123456Z";
    assert_eq!(dates, ["9999-12-31T23:59:59Z", added, added]);
    assert_eq!(keys[0].id, world.key.key_id);
    assert_ne!(keys[1].spki_sha256, keys[2].spki_sha256);

    let requests = world.issuer.requests().await;
    let callers: Vec<_> = requests
        .iter()
        .filter(|r| r.path == path)
        .map(|r| r.user_id.as_str())
        .collect();
    assert_eq!(callers, [user; 3]);
}

/// Up to v4.13.1, ZITADEL answers a refused assertion with 500. Only discovery distinguishes it from an outage
/// (docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint).
#[tokio::test]
async fn a_refused_assertion_is_recognized_in_both_dialects() {
    let world = World::new().await;
    let user = &world.key.user_id;
    let (removed, file) = world.issuer.key(user, json!({})).await;
    world.issuer.remove_key(user, &removed).await;
    let (_, expired) = world
        .issuer
        .key(user, json!({"expirationDate": "2020-01-01T00:00:00Z"}))
        .await;
    let removed = key::parse(file.as_bytes()).expect("a key file");
    let expired = key::parse(expired.as_bytes()).expect("a key file");
    let stranger = ServiceKey {
        user_id: "69234237810729000".into(),
        ..world.key.clone()
    };
    for (dialect, status) in [("invalid_grant", 400), ("errors_internal", 500)] {
        world.issuer.settings(json!({"dialect": dialect})).await;
        for key in [&removed, &expired, &stranger] {
            let got = exchange(&world.instance, key, "openid").await;
            assert_eq!(got.err(), Some(Reason::KeyRejected), "{dialect}");
            assert_eq!(world.token_requests().await.last().map(|r| r.status), Some(status));
        }
        world.issuer.change_user(user, json!({"state": "inactive"})).await;
        assert_eq!(world.mint().await.err(), Some(Reason::UserInactive), "{dialect}");
        world.issuer.change_user(user, json!({"state": "active"})).await;
        assert!(world.mint().await.is_ok(), "{dialect}");
    }

    world.issuer.settings(json!({"dialect": "errors_internal"})).await;
    world
        .issuer
        .fault(json!({"path": DISCOVERY, "status": 503, "body": ""}))
        .await;
    let got = exchange(&world.instance, &removed, "openid").await;
    assert_eq!(
        got.err(),
        Some(Reason::ServerError),
        "an outage, because discovery fails too"
    );
}

/// Discovery shows the server's clock, and the operator signs assertions by it. If the clocks differ by more than five
/// minutes, the operator signs nothing, so an assertion never becomes valid only later
/// (docs/reference/zitadel-protocol.md#the-assertion, docs/adr/0011-times-follow-the-servers-clock.md).
#[tokio::test]
async fn a_clock_skew_of_up_to_five_minutes_is_compensated() {
    let table = [
        (-TEN_YEARS, false),
        (-30 * 60, false),
        (-310, false),
        (-290, true),
        (-30, true),
        (-14, true),
        (-5, true),
        (5, true),
        (50, true),
        (70, true),
        (290, true),
        (310, false),
        (30 * 60, false),
        (TEN_YEARS, false),
    ];
    let world = World::new().await;
    for (seconds, followed) in table {
        world.clock(seconds).await;
        let before = world.token_requests().await.len();
        let instance = connect(settings(&world.issuer.url));
        let minted = world.mint_by(&instance).await;
        let asked = world.token_requests().await.len() - before;
        match minted {
            Ok(minted) => {
                assert!(followed && asked == 1, "server {seconds} s ahead: asked {asked} times");
                let lifetime = minted.expires.duration_since(minted.issued).as_secs();
                assert!(
                    (LIFETIME - 3..=LIFETIME).contains(&lifetime),
                    "{lifetime} s of {LIFETIME}"
                );
                let age = Timestamp::now().as_second() + seconds - minted.issued.as_second();
                assert!((-1..=5).contains(&age), "issued {age} s ago by the server's clock");
            }
            Err(reason) => {
                assert_eq!(
                    (reason, followed),
                    (Reason::ClockSkew, false),
                    "server {seconds} s ahead"
                );
                assert_eq!(asked, 0, "nothing is signed");
                // Once the clock is corrected, the next discovery is enough.
                world.clock(0).await;
                instance.discover().await.expect("discovered");
                assert!(world.mint_by(&instance).await.is_ok(), "clock corrected");
            }
        }
    }
}

/// ZITADEL refuses an assertion with a wrong time like one with a bad key. The operator first checks the `Date` of the
/// refusal: this costs one more token request, and none for the next token
/// (docs/reference/zitadel-protocol.md#errors-of-the-token-endpoint).
#[tokio::test]
async fn a_changed_server_clock_costs_one_refusal_and_does_not_reject_the_key() {
    for dialect in ["invalid_grant", "errors_internal"] {
        let world = World::new().await;
        world.issuer.settings(json!({"dialect": dialect})).await;
        assert!(world.mint().await.is_ok());
        for seconds in [-120, 120, -290] {
            world.clock(seconds).await;
            let before = world.token_requests().await.len();
            assert!(world.mint().await.is_ok(), "{seconds} s, {dialect}");
            assert_eq!(world.token_requests().await.len() - before, 2, "{seconds} s, {dialect}");
            assert!(world.mint().await.is_ok());
            assert_eq!(world.token_requests().await.len() - before, 3, "{seconds} s, {dialect}");
        }
        world.clock(-30 * 60).await;
        assert_eq!(world.mint().await.err(), Some(Reason::ClockSkew), "{dialect}");
    }
}

/// A proxy may have its own clock, and a cache keeps the `Date` of a stored answer (RFC 9111 §5.1). Neither a single
/// answer nor any number of cached ones changes the skew (docs/adr/0011-times-follow-the-servers-clock.md).
#[tokio::test]
async fn a_single_wrong_date_changes_nothing() {
    let world = World::new().await;
    let wrong = "Wed, 25 Nov 2015 12:00:00 GMT";
    let path = DISCOVERY;
    world
        .issuer
        .fault(json!({"path": path, "times": 1, "headers": {"Date": wrong}}))
        .await;
    assert!(world.mint().await.is_ok(), "the second answer is correct");
    let cached = json!({"path": path, "headers": {"Date": wrong, "Age": "86400"}});
    world.issuer.fault(cached).await;
    for _ in 0..3 {
        world.instance.discover().await.expect("discovered");
    }
    assert!(world.mint().await.is_ok());
    world.issuer.clear_faults().await;

    world
        .issuer
        .fault(json!({"path": TOKEN, "headers": {"Date": "yesterday"}}))
        .await;
    assert!(world.mint().await.is_ok(), "an unreadable date");
    assert_eq!(world.instance.skew().rounded_seconds(), None);
}

/// A `Date` beyond the limit is reported, and the skew that was measured before it stays in use.
#[tokio::test]
async fn a_date_beyond_the_limit_is_reported_and_not_used() {
    let world = World::new().await;
    world.clock(40).await;
    world.mint().await.expect("a token");
    for ahead in [TEN_YEARS, -TEN_YEARS, 310, -310] {
        let ours = Timestamp::now();
        let used = world.instance.skew().theirs(ours);
        assert_eq!(world.instance.skew().certain(ours), Some(used));
        let offset = SignedDuration::from_secs(ahead);
        let date = (Timestamp::now() + offset).strftime("%a, %d %b %Y %H:%M:%S GMT");
        let headers = json!({"Date": date.to_string(), "Retry-After": "900"});
        world.issuer.fault(json!({"path": DISCOVERY, "headers": headers})).await;
        world.instance.discover().await.expect("discovered");
        let skew = world.instance.skew();
        assert_eq!(skew.check(), Err(Reason::ClockSkew), "{ahead}");
        assert!(
            skew.measured().as_secs().abs_diff(ahead) <= 2,
            "{ahead}: {:?}",
            skew.measured()
        );
        assert_eq!((skew.theirs(ours), skew.certain(ours)), (used, None), "{ahead}");

        let before = world.token_requests().await.len();
        assert_eq!(world.mint().await.err(), Some(Reason::ClockSkew), "{ahead}");
        assert_eq!(world.token_requests().await.len(), before, "nothing is signed");
        world.issuer.clear_faults().await;
        world.instance.discover().await.expect("discovered");
        let minted = world.mint().await.expect("a token");
        let age = Timestamp::now().as_second() + 40 - minted.issued.as_second();
        assert!((-1..=5).contains(&age), "issued {age} s ago by the server's clock");
    }
}

/// An assertion can be replayed until it expires, so it must be short-lived. `aud` is the issuer to the letter, `iss`
/// and `sub` are the user id, and `kid` is the key id (docs/reference/zitadel-protocol.md#the-assertion).
#[tokio::test]
async fn an_assertion_is_short_lived_and_names_issuer_user_and_key() {
    let world = World::new().await;
    let before = Timestamp::now().as_second();
    world.mint().await.expect("a token");
    let after = Timestamp::now().as_second();
    let assertion = world.token_requests().await.remove(0).assertion;
    let (header, claims) = (&assertion["header"], &assertion["claims"]);
    assert_eq!(header["kid"], world.key.key_id.as_str());
    // Every version accepts RS256 for RSA keys (docs/reference/zitadel-protocol.md#key-sizes-and-algorithms).
    assert_eq!(header["alg"], "RS256");
    assert_eq!(claims["aud"], world.issuer.url.as_str());
    assert_eq!(claims["iss"], world.key.user_id.as_str());
    assert_eq!(claims["sub"], world.key.user_id.as_str());
    let number = |name: &str| claims[name].as_i64().expect("whole seconds");
    assert!(number("exp") - number("iat") < 120, "{claims}");
    assert!(number("iat") < before && number("exp") > after, "{claims}");
    assert!(number("exp") <= after + 60, "{claims}");
}

/// RFC 7523 §2.1, docs/reference/zitadel-protocol.md#token-request. A second `scope` field could hold scopes that no
/// access policy allows, and an `Authorization` header would be a second credential.
#[tokio::test]
async fn a_token_request_is_one_form_with_one_scope_field_and_no_other_credential() {
    let world = World::new().await;
    let fields = json!({
        "projectIDs": [PROJECT, "2"],
        "zitadelAPI": true,
        "projectRoles": true,
        "organizationID": "3",
        "scopes": ["profile", "urn:zitadel:iam:org:project:role:reader"],
    });
    exchange(&world.instance, &world.key, &scope(&fields))
        .await
        .expect("a token");
    let request = world.token_requests().await.remove(0);
    let form = request.form.as_object().expect("a form");
    assert_eq!(form.keys().collect::<Vec<_>>(), ["assertion", "grant_type", "scope"]);
    for (name, values) in form {
        assert_eq!(values.as_array().map(Vec::len), Some(1), "{name}");
    }
    assert_eq!(form["grant_type"][0], "urn:ietf:params:oauth:grant-type:jwt-bearer");
    assert_eq!((request.method.as_str(), request.query.as_str()), ("POST", ""));
    assert!(!request.authorized);

    let sent = form["scope"][0].as_str().expect("text").split(' ');
    let intended = [
        "profile",
        "urn:zitadel:iam:org:id:3",
        "urn:zitadel:iam:org:project:id:2:aud",
        "urn:zitadel:iam:org:project:id:69234237810729019:aud",
        "urn:zitadel:iam:org:project:id:zitadel:aud",
        "urn:zitadel:iam:org:project:role:reader",
        "urn:zitadel:iam:org:projects:roles",
    ];
    assert_eq!(sent.collect::<Vec<_>>(), intended);
}

/// An opaque token has no readable audience, so the operator asks the API for the id, authorized by that token only
/// (docs/reference/zitadel-protocol.md#the-zitadel-apis-audience, docs/adr/0007-audience-must-be-equal.md).
#[tokio::test]
async fn the_api_is_asked_for_the_project_id_only_if_the_token_is_opaque() {
    let issuer = Issuer::start(&[]);
    issuer.settings(json!({"zitadelProjectId": "401085856582099999"})).await;
    for (kind, asked) in [("JWT", 0), ("BEARER", 1)] {
        let key = user(&issuer, kind).await;
        let instance = connect(settings(&issuer.url));
        for _ in 0..2 {
            assert_eq!(instance.project_id(&key).await, Ok("401085856582099999"), "{kind}");
        }
        let requests = issuer.requests().await;
        let iam: Vec<_> = requests.iter().filter(|r| r.path == "/management/v1/iam").collect();
        assert_eq!(iam.len(), asked, "{kind}");
        assert!(iam.iter().all(|r| r.authorized && r.method == "GET"), "{kind}");
    }
}

/// The server does not know the host. Discovery fails first, so the operator signs nothing
/// (docs/reference/zitadel-protocol.md#instance-selection).
#[tokio::test]
async fn nothing_is_signed_for_a_host_that_serves_no_instance() {
    let world = World::new().await;
    world
        .issuer
        .settings(json!({"externalDomain": "auth.example.com"}))
        .await;
    let got = world.instance.exchange(&world.key, "openid").await;
    let failure = got.map(|_| ()).expect_err("no such instance");
    assert!(
        matches!(
            failure,
            Failure::Status {
                code: 404,
                error: None,
                ..
            }
        ),
        "{failure:?}"
    );
    assert_eq!(classify(failure, false), Reason::MalformedResponse);
    assert_eq!(world.token_requests().await.len(), 0);
}

/// With the instance host header, a server that is dialled by another name serves the configured issuer, with or
/// without a port. The tokens name that issuer too (docs/reference/zitadel-protocol.md#instance-selection).
#[tokio::test]
async fn the_instance_host_header_selects_the_issuer() {
    for host in ["auth.example.com", "auth.example.com:8443"] {
        let issuer = Issuer::start(&[]);
        let domain = json!({"externalDomain": "auth.example.com", "externalSecure": true});
        issuer.settings(domain).await;
        let key = user(&issuer, "JWT").await;
        let instance = connect(Settings {
            endpoint: Some(issuer.url.clone()),
            ..settings(&format!("https://{host}"))
        });
        let minted = mint(&instance, &key, &json!({"projectIDs": [PROJECT]}))
            .await
            .expect("a token");
        assert_eq!(claims(minted.token.expose_secret())["iss"], format!("https://{host}"));
        let requests = issuer.requests().await;
        assert!(requests.iter().all(|r| r.instance_host == host), "{requests:?}");
    }
}

/// The server ignores the port to find the instance, and keeps it in the issuer. Without the port it is another issuer
/// (docs/reference/zitadel-protocol.md#instance-selection).
#[tokio::test]
async fn the_port_is_part_of_the_issuer() {
    let world = World::new().await;
    let minted = world.mint().await.expect("a token");
    let iss = claims(minted.token.expose_secret())["iss"].clone();
    assert_eq!(iss, world.issuer.url.as_str());

    // As if a proxy in front of the server had dropped the port from the host.
    let (without, _) = world.issuer.url.rsplit_once(':').expect("a port");
    let body = json!({"issuer": without, "token_endpoint": format!("{without}{TOKEN}")}).to_string();
    world.issuer.fault(json!({"path": DISCOVERY, "body": body})).await;
    let outcome = world.instance.discover().await;
    assert_eq!(outcome, Err(Failure::Known(Reason::IssuerMismatch)));
}

/// Discovery cannot redirect the operator (docs/adr/0019-assertions-go-only-to-the-configured-host.md).
#[tokio::test]
async fn discovery_that_names_another_server_is_refused() {
    let world = World::new().await;
    let elsewhere = Elsewhere::new();
    let (ours, theirs) = (world.issuer.url.clone(), elsewhere.url());
    let authority = ours.strip_prefix("http://").expect("http");
    let table = [
        (theirs.clone(), format!("{theirs}{TOKEN}")),
        (theirs.clone(), format!("{ours}{TOKEN}")),
        (ours.clone(), format!("{theirs}{TOKEN}")),
        (
            ours.clone(),
            format!("http://{authority}@{}{TOKEN}", &theirs["http://".len()..]),
        ),
        (
            ours.clone(),
            format!("{ours}{TOKEN}?scope=urn:zitadel:iam:org:project:id:zitadel:aud"),
        ),
    ];
    for (issuer, endpoint) in table {
        let body = json!({"issuer": issuer, "token_endpoint": endpoint}).to_string();
        world
            .issuer
            .fault(json!({"path": DISCOVERY, "times": 1, "body": body}))
            .await;
        let got = world.instance.exchange(&world.key, "openid").await;
        let failure = got.map(|_| ()).expect_err("refused");
        assert_eq!(failure, Failure::Known(Reason::IssuerMismatch), "{issuer} {endpoint}");
    }
    elsewhere.assert_untouched();
    assert_eq!(world.token_requests().await.len(), 0, "nothing was signed");
}

/// An assertion goes only to the configured host (docs/adr/0019-assertions-go-only-to-the-configured-host.md).
#[tokio::test]
async fn a_redirect_is_not_followed() {
    let world = World::new().await;
    let elsewhere = Elsewhere::new();
    for status in [301, 302, 303, 307, 308] {
        for path in [DISCOVERY, TOKEN] {
            let location = format!("{}{path}", elsewhere.url());
            world
                .issuer
                .fault(json!({"path": path, "times": 1, "status": status, "headers": {"Location": location}}))
                .await;
            let failure = if path == TOKEN {
                world.instance.exchange(&world.key, "openid").await.map(|_| ())
            } else {
                world.instance.discover().await.map(|_| ())
            };
            let failure = failure.expect_err("no usable answer");
            assert_eq!(classify(failure, true), Reason::MalformedResponse, "{status} {path}");
        }
    }
    elsewhere.assert_untouched();
}

/// The client does not trust the stand-in's CA.
#[tokio::test]
async fn a_server_with_an_unknown_ca_gets_no_request() {
    let issuer = Issuer::start(&["--tls"]);
    let key = user(&issuer, "JWT").await;
    let got = connect(settings(&issuer.url)).exchange(&key, "openid").await;
    let failure = got.map(|_| ()).expect_err("untrusted");
    assert_eq!(classify(failure, false), Reason::TLSFailure);
    assert_eq!(issuer.requests().await.len(), 0);
}

/// RFC 9110 §10.2.3. ZITADEL itself sends no `Retry-After`; a proxy in front of it may
/// (docs/reference/zitadel-protocol.md#rate-limits).
#[tokio::test]
async fn retry_after_reaches_the_failure_as_seconds_and_as_a_date() {
    let world = World::new().await;
    world.mint().await.expect("a token");
    let refusal = |status: u16, value: String| {
        json!({
            "path": TOKEN, "times": 1, "status": status, "body": "Your ZITADEL instance is blocked.",
            "headers": {"Content-Type": "text/plain", "Retry-After": value},
        })
    };
    for (status, reason) in [(429, Reason::RateLimited), (503, Reason::ServerError)] {
        world.issuer.fault(refusal(status, "7".into())).await;
        let before = Timestamp::now();
        let (failure, at) = refused(&world).await;
        let seven = SignedDuration::from_secs(7);
        assert!(
            at.is_some_and(|at| at >= before + seven && at <= Timestamp::now() + seven),
            "{at:?}"
        );
        assert_eq!(classify(failure, true), reason);

        // The delay counts from the answer.
        let slow = SignedDuration::from_millis(1_500);
        let mut late = refusal(status, "7".into());
        late["latencyMillis"] = json!(1_500);
        world.issuer.fault(late).await;
        let before = Timestamp::now();
        let (_, at) = refused(&world).await;
        assert!(at.is_some_and(|at| at >= before + slow + seven), "{at:?}");

        let wanted = Timestamp::now() + SignedDuration::from_mins(2);
        let date = wanted.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
        world.issuer.fault(refusal(status, date)).await;
        let (failure, at) = refused(&world).await;
        assert_eq!(at.map(Timestamp::as_second), Some(wanted.as_second()));
        assert_eq!(classify(failure, true), reason);
    }

    world
        .issuer
        .fault(json!({"path": TOKEN, "times": 1, "status": 429, "body": "no"}))
        .await;
    let (failure, at) = refused(&world).await;
    assert_eq!((classify(failure, true), at), (Reason::RateLimited, None));
}

/// The failure of a refused exchange, and its retry-after deadline.
async fn refused(world: &World) -> (Failure, Option<Timestamp>) {
    let got = world.instance.exchange(&world.key, "openid").await;
    let failure = got.map(|_| ()).expect_err("refused");
    match failure {
        Failure::Status { retry_after, .. } => (failure, retry_after),
        other => panic!("{other:?}"),
    }
}

/// `expires_in` may be absent, for example with a lifetime of one second. A JWT then has its own `exp`; an opaque token
/// has none (docs/reference/zitadel-protocol.md#token-response).
#[tokio::test]
async fn without_expires_in_the_exp_claim_counts() {
    let world = World::new().await;
    let minted = world.mint().await.expect("a token");
    let jwt = minted.token.expose_secret();
    let exp = claims(jwt)["exp"].as_i64().expect("exp");
    let body = json!({"access_token": jwt, "token_type": "Bearer"}).to_string();
    let got = world.judge(body).await.expect("a token");
    assert_eq!(got.expires.as_second(), exp);

    let body = json!({"access_token": "a.b.c.d.e", "token_type": "Bearer"}).to_string();
    assert_eq!(world.judge(body).await.err(), Some(Reason::MalformedResponse));
}

/// The server chooses the lifetime, for each instance (docs/reference/zitadel-protocol.md#lifetimes).
#[tokio::test]
async fn the_server_chooses_the_lifetime() {
    let world = World::new().await;
    for seconds in [60, 3600] {
        world.issuer.settings(json!({"lifetimeSeconds": seconds})).await;
        let minted = world.mint().await.expect("a token");
        let lifetime = minted.expires.duration_since(minted.issued).as_secs();
        // Rounded down by the server, and JWT times are whole seconds.
        assert!((seconds - 2..=seconds).contains(&lifetime), "{lifetime} of {seconds}");
    }
    world.issuer.settings(json!({"lifetimeSeconds": 4})).await;
    assert_eq!(world.mint().await.err(), Some(Reason::LifetimeTooShort));
}

/// docs/adr/0010-refresh-schedule-with-stable-jitter.md
#[tokio::test]
async fn an_invalid_lifetime_is_refused_and_a_huge_one_is_capped() {
    let world = World::new().await;
    let month = SignedDuration::from_hours(31 * 24).as_secs();
    let table = [
        ("60", Ok(60)),
        ("-1", Err(Reason::MalformedResponse)),
        ("-9223372036854775808", Err(Reason::MalformedResponse)),
        ("0", Err(Reason::LifetimeTooShort)),
        ("1.5", Err(Reason::MalformedResponse)),
        ("1e3", Err(Reason::MalformedResponse)),
        ("\"60\"", Err(Reason::MalformedResponse)),
        ("9223372036854775807", Ok(month)),
        ("9223372036854775808", Err(Reason::MalformedResponse)),
        ("1e999", Err(Reason::MalformedResponse)),
    ];
    for (expires_in, wanted) in table {
        let body = format!(r#"{{"access_token":"a.b.c.d.e","token_type":"Bearer","expires_in":{expires_in}}}"#);
        let got = world.judge(body).await;
        let got = got.map(|minted| minted.expires.duration_since(minted.issued).as_secs());
        assert_eq!(got, wanted, "{expires_in}");
    }
}

/// An invalid answer is never written to a Secret (docs/adr/0019-assertions-go-only-to-the-configured-host.md).
#[tokio::test]
async fn a_body_without_a_valid_token_is_refused() {
    let world = World::new().await;
    let with =
        |token: &str, kind: &str| json!({"access_token": token, "token_type": kind, "expires_in": 60}).to_string();
    let table = [
        ("a token with spaces", with("a b", "Bearer")),
        ("a token with a line break", with("a\r\nb", "Bearer")),
        ("a token that is not ASCII", with("ä", "Bearer")),
        ("an empty token", with("", "Bearer")),
        ("a token that is too long", with(&"a".repeat(32 * 1024 + 1), "Bearer")),
        ("another token type", with("a", "MAC")),
        (
            "no token type",
            json!({"access_token": "a", "expires_in": 60}).to_string(),
        ),
        (
            "no token",
            json!({"token_type": "Bearer", "expires_in": 60}).to_string(),
        ),
        ("HTML", "<html><body>Sign in</body></html>".into()),
        ("an empty body", String::new()),
        ("a list", "[]".into()),
        ("deep nesting", "[".repeat(100_000)),
        ("an error with 200", json!({"error": "invalid_grant"}).to_string()),
    ];
    for (name, body) in table {
        assert_eq!(world.judge(body).await.err(), Some(Reason::MalformedResponse), "{name}");
    }
    assert!(
        world.judge(with("a.b.c.d.e", "bearer")).await.is_ok(),
        "RFC 6749 §5.1: case does not matter"
    );
}

/// The operator reads no more than 256 KiB of an answer (docs/adr/0019-assertions-go-only-to-the-configured-host.md).
#[tokio::test]
async fn a_body_of_a_mebibyte_is_refused() {
    let world = World::new().await;
    for path in [TOKEN, DISCOVERY] {
        world
            .issuer
            .fault(json!({"path": path, "times": 1, "status": 200, "body": " ", "repeatBodyBytes": 1 << 20}))
            .await;
        let failure = if path == TOKEN {
            world.instance.exchange(&world.key, "openid").await.map(|_| ())
        } else {
            world.instance.discover().await.map(|_| ())
        };
        assert_eq!(failure, Err(Failure::Malformed), "{path}");
    }
}

/// One answer sends its headers in time and then single bytes; the other never starts
/// (docs/adr/0019-assertions-go-only-to-the-configured-host.md).
#[tokio::test]
async fn a_slow_or_missing_answer_times_out() {
    let world = World::with(|url| Settings {
        timeout: Duration::from_secs(1),
        ..settings(url)
    })
    .await;
    world.instance.discover().await.expect("discovered");
    for slow in [json!({"dripMillisPerByte": 500}), json!({"hang": true})] {
        let mut fault = slow;
        fault["path"] = TOKEN.into();
        fault["times"] = Value::from(1);
        world.issuer.fault(fault.clone()).await;
        let failure = world.instance.exchange(&world.key, "openid").await.map(|_| ());
        assert_eq!(failure, Err(Failure::Timeout), "{fault}");
        assert_eq!(classify(Failure::Timeout, true), Reason::InstanceUnreachable);
    }
}

/// A broken connection or a truncated answer says nothing about the key.
#[tokio::test]
async fn a_broken_connection_does_not_reject_the_key() {
    let world = World::new().await;
    world
        .issuer
        .fault(json!({"path": TOKEN, "times": 1, "reset": true}))
        .await;
    assert_eq!(world.mint().await.err(), Some(Reason::InstanceUnreachable));
    let cut_off = json!({"path": TOKEN, "times": 1, "body": "{", "headers": {"Content-Length": "1000"}});
    world.issuer.fault(cut_off).await;
    assert_eq!(world.mint().await.err(), Some(Reason::MalformedResponse));
    assert!(world.mint().await.is_ok());
}
