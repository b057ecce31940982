//! What only the stand-in can be told to do: lifetimes at runtime, the older dialect, a clock that is off, another
//! domain, TLS of an unknown CA, faults; and what only its recorder can tell. `make test-zitadel` leaves this file out.

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

/// Seconds that a token lives, ZITADEL's default.
const LIFETIME: i64 = 12 * 3600;

/// A stand-in with one user whose tokens are JWTs, and a connection to it.
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

    /// What a token for [`PROJECT`] must be.
    fn expected(&self) -> Expected {
        expected(&self.instance, &self.key, &json!({"projectIDs": [PROJECT]}), "unused")
    }

    /// A token for [`PROJECT`], without a look at the project id before.
    pub async fn mint(&self) -> Result<Minted, Reason> {
        self.mint_by(&self.instance).await
    }

    /// The same by another connection.
    async fn mint_by(&self, instance: &ZitadelClient) -> Result<Minted, Reason> {
        let scope = scope(&json!({"projectIDs": [PROJECT]}));
        let got = exchange(instance, &self.key, &scope).await?;
        accept(got.answer, &self.expected(), got.sent)
    }

    /// Sets the server's clock so many seconds ahead.
    async fn clock(&self, seconds: i64) {
        self.issuer.settings(json!({"clockOffsetMillis": seconds * 1000})).await;
    }

    /// What becomes of this body of a 200.
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

/// Another server, which nobody is to call.
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

    /// Nobody has connected. To be asked when the call that might have led here has returned: a connection that was
    /// used by then is in the queue.
    fn assert_untouched(&self) {
        let outcome = self.0.accept();
        assert!(
            outcome.as_ref().is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
            "{outcome:?}"
        );
    }
}

/// §2.1: up to v4.13 a refused assertion is a 500, which only a working discovery tells from an outage.
#[tokio::test]
async fn a_refused_assertion_is_known_in_both_dialects() {
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
        "an outage, since discovery fails too"
    );
}

/// §2, check 4; §10.2; design §3.8. Discovery shows the server's clock, and the assertion is signed by it. More than
/// five minutes away nothing is signed: no assertion is ever valid only in the future.
#[tokio::test]
async fn a_clock_that_is_off_is_followed_for_five_minutes() {
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
                // Whoever mends the clock is believed as soon as discovery has told.
                world.clock(0).await;
                instance.discover().await.expect("discovered");
                assert!(world.mint_by(&instance).await.is_ok(), "mended");
            }
        }
    }
}

/// §2.1: the refusal of an assertion by the clock looks like that of a bad key. What it says of the clock is looked at
/// first: one more request, and none for the next token.
#[tokio::test]
async fn a_clock_that_is_set_costs_one_refusal_and_is_not_the_keys_fault() {
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

/// Design §3.8: a proxy on the way may have a clock of its own, and a cache keeps the `Date` of what it holds (RFC 9111
/// §5.1). One answer moves nothing, nor does any number of old ones.
#[tokio::test]
async fn one_date_that_lies_moves_nothing() {
    let world = World::new().await;
    let lie = "Wed, 25 Nov 2015 12:00:00 GMT";
    let path = DISCOVERY;
    world
        .issuer
        .fault(json!({"path": path, "times": 1, "headers": {"Date": lie}}))
        .await;
    assert!(world.mint().await.is_ok(), "the second answer is right");
    let cached = json!({"path": path, "headers": {"Date": lie, "Age": "86400"}});
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
    assert!(world.mint().await.is_ok(), "no date at all");
    assert_eq!(world.instance.skew().rounded_seconds(), None);
}

/// A `Date` beyond the bound is told, and what was measured before it stays in use.
#[tokio::test]
async fn a_date_beyond_the_bound_is_told_and_not_used() {
    let world = World::new().await;
    world.clock(40).await;
    world.mint().await.expect("a token");
    for ahead in [TEN_YEARS, -TEN_YEARS, 310, -310] {
        let ours = Timestamp::now();
        let used = world.instance.skew().theirs(ours);
        assert_eq!(world.instance.skew().certain(ours), Some(used));
        let lie = SignedDuration::from_secs(ahead);
        let date = (Timestamp::now() + lie).strftime("%a, %d %b %Y %H:%M:%S GMT");
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

/// §2: an assertion can be used again until it ends, hence two minutes at most. `aud` is the issuer to the letter,
/// `iss` and `sub` are the user's id, `kid` the key's.
#[tokio::test]
async fn an_assertion_is_short_lived_and_names_issuer_user_and_key() {
    let world = World::new().await;
    let before = Timestamp::now().as_second();
    world.mint().await.expect("a token");
    let after = Timestamp::now().as_second();
    let assertion = world.token_requests().await.remove(0).assertion;
    let (header, claims) = (&assertion["header"], &assertion["claims"]);
    assert_eq!(header["kid"], world.key.key_id.as_str());
    // §1.3: valid for RSA keys on every version.
    assert_eq!(header["alg"], "RS256");
    assert_eq!(claims["aud"], world.issuer.url.as_str());
    assert_eq!(claims["iss"], world.key.user_id.as_str());
    assert_eq!(claims["sub"], world.key.user_id.as_str());
    let number = |name: &str| claims[name].as_i64().expect("whole seconds");
    assert!(number("exp") - number("iat") < 120, "{claims}");
    assert!(number("iat") < before && number("exp") > after, "{claims}");
    assert!(number("exp") <= after + 60, "{claims}");
}

/// RFC 7523 §2.1; §10.1; design §2.2. A second `scope` would be one that nobody allowed, and a header would be another
/// credential.
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

/// §6.2, design §3.11: an opaque token has no audience to read, so the API is asked, with the token and nothing else.
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

/// §5.2, §10.7: a host that the server does not know. Discovery fails first, so that nothing is signed.
#[tokio::test]
async fn nothing_is_signed_for_a_host_that_is_no_instance() {
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
    assert_eq!(classify(failure, false), Reason::MalformedAnswer);
    assert_eq!(world.token_requests().await.len(), 0);
}

/// §5.2, §10.7: dialled by another name, with the header the server is the issuer that we want, port or none; the
/// tokens name it too.
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

/// §5.2, §10.7: the server does not match the port, the issuer follows it. Without the port it is another issuer.
#[tokio::test]
async fn the_port_is_part_of_the_issuer() {
    let world = World::new().await;
    let minted = world.mint().await.expect("a token");
    let iss = claims(minted.token.expose_secret())["iss"].clone();
    assert_eq!(iss, world.issuer.url.as_str());

    // As if a proxy in front had dropped the port from the host.
    let (without, _) = world.issuer.url.rsplit_once(':').expect("a port");
    let body = json!({"issuer": without, "token_endpoint": format!("{without}{TOKEN}")}).to_string();
    world.issuer.fault(json!({"path": DISCOVERY, "body": body})).await;
    let outcome = world.instance.discover().await;
    assert_eq!(outcome, Err(Failure::Known(Reason::IssuerMismatch)));
}

/// Design §2.1: discovery does not move us.
#[tokio::test]
async fn discovery_that_names_another_server_is_not_followed() {
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
        let failure = got.map(|_| ()).expect_err("not to be followed");
        assert_eq!(failure, Failure::Known(Reason::IssuerMismatch), "{issuer} {endpoint}");
    }
    elsewhere.assert_untouched();
    assert_eq!(world.token_requests().await.len(), 0, "nothing was signed");
}

/// Design §3.10: an assertion goes where it was meant to go.
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
            let failure = failure.expect_err("no answer that can be used");
            assert_eq!(classify(failure, true), Reason::MalformedAnswer, "{status} {path}");
        }
    }
    elsewhere.assert_untouched();
}

/// The stand-in's CA is one that nobody knows.
#[tokio::test]
async fn a_server_of_an_unknown_ca_gets_nothing() {
    let issuer = Issuer::start(&["--tls"]);
    let key = user(&issuer, "JWT").await;
    let got = connect(settings(&issuer.url)).exchange(&key, "openid").await;
    let failure = got.map(|_| ()).expect_err("no trust");
    assert_eq!(classify(failure, false), Reason::TLSFailure);
    assert_eq!(issuer.requests().await.len(), 0);
}

/// RFC 9110 §10.2.3. ZITADEL itself sends none (§5.4), what stands before it may.
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

        // It is counted from the answer.
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

/// A refused exchange, and until when.
async fn refused(world: &World) -> (Failure, Option<Timestamp>) {
    let got = world.instance.exchange(&world.key, "openid").await;
    let failure = got.map(|_| ()).expect_err("refused");
    match failure {
        Failure::Status { retry_after, .. } => (failure, retry_after),
        other => panic!("{other:?}"),
    }
}

/// §4.4, design §3.10: `expires_in` may be absent, as at a lifetime of one second (§10.6). Then a JWT says itself when
/// it ends; an opaque token does not.
#[tokio::test]
async fn without_expires_in_the_claim_counts() {
    let world = World::new().await;
    let minted = world.mint().await.expect("a token");
    let jwt = minted.token.expose_secret();
    let exp = claims(jwt)["exp"].as_i64().expect("exp");
    let body = json!({"access_token": jwt, "token_type": "Bearer"}).to_string();
    let got = world.judge(body).await.expect("a token");
    assert_eq!(got.expires.as_second(), exp);

    let body = json!({"access_token": "a.b.c.d.e", "token_type": "Bearer"}).to_string();
    assert_eq!(world.judge(body).await.err(), Some(Reason::MalformedAnswer));
}

/// §4.4: the lifetime is the server's to choose, per instance.
#[tokio::test]
async fn a_lifetime_is_taken_as_the_server_sets_it() {
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

/// Design §3.10.
#[tokio::test]
async fn a_lifetime_that_is_no_number_of_seconds_is_refused_and_a_huge_one_capped() {
    let world = World::new().await;
    let month = SignedDuration::from_hours(31 * 24).as_secs();
    let table = [
        ("60", Ok(60)),
        ("-1", Err(Reason::MalformedAnswer)),
        ("-9223372036854775808", Err(Reason::MalformedAnswer)),
        ("0", Err(Reason::LifetimeTooShort)),
        ("1.5", Err(Reason::MalformedAnswer)),
        ("1e3", Err(Reason::MalformedAnswer)),
        ("\"60\"", Err(Reason::MalformedAnswer)),
        ("9223372036854775807", Ok(month)),
        ("9223372036854775808", Err(Reason::MalformedAnswer)),
        ("1e999", Err(Reason::MalformedAnswer)),
    ];
    for (expires_in, wanted) in table {
        let body = format!(r#"{{"access_token":"a.b.c.d.e","token_type":"Bearer","expires_in":{expires_in}}}"#);
        let got = world.judge(body).await;
        let got = got.map(|minted| minted.expires.duration_since(minted.issued).as_secs());
        assert_eq!(got, wanted, "{expires_in}");
    }
}

/// Design §3.10: what is no answer of ZITADEL's is not written into a Secret.
#[tokio::test]
async fn a_body_that_is_no_token_is_refused() {
    let world = World::new().await;
    let with =
        |token: &str, kind: &str| json!({"access_token": token, "token_type": kind, "expires_in": 60}).to_string();
    let table = [
        ("a token with spaces", with("a b", "Bearer")),
        ("one with a line break", with("a\r\nb", "Bearer")),
        ("one that is no ASCII", with("ä", "Bearer")),
        ("an empty one", with("", "Bearer")),
        ("one that is too long", with(&"a".repeat(32 * 1024 + 1), "Bearer")),
        ("another kind", with("a", "MAC")),
        ("no kind", json!({"access_token": "a", "expires_in": 60}).to_string()),
        (
            "no token",
            json!({"token_type": "Bearer", "expires_in": 60}).to_string(),
        ),
        ("HTML", "<html><body>Sign in</body></html>".into()),
        ("nothing", String::new()),
        ("a list", "[]".into()),
        ("depth", "[".repeat(100_000)),
        ("an error with 200", json!({"error": "invalid_grant"}).to_string()),
    ];
    for (name, body) in table {
        assert_eq!(world.judge(body).await.err(), Some(Reason::MalformedAnswer), "{name}");
    }
    assert!(
        world.judge(with("a.b.c.d.e", "bearer")).await.is_ok(),
        "RFC 6749 §5.1: case does not matter"
    );
}

/// Design §3.10: no more is read than an answer can have.
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

/// Design §3.10: headers in time, then a byte now and then; and no answer at all.
#[tokio::test]
async fn an_answer_that_does_not_end_in_time_is_given_up() {
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

/// A connection that breaks, or an answer that does, is no refusal of the key.
#[tokio::test]
async fn a_connection_that_breaks_is_no_refusal() {
    let world = World::new().await;
    world
        .issuer
        .fault(json!({"path": TOKEN, "times": 1, "reset": true}))
        .await;
    assert_eq!(world.mint().await.err(), Some(Reason::InstanceUnreachable));
    let cut_off = json!({"path": TOKEN, "times": 1, "body": "{", "headers": {"Content-Length": "1000"}});
    world.issuer.fault(cut_off).await;
    assert_eq!(world.mint().await.err(), Some(Reason::MalformedAnswer));
    assert!(world.mint().await.is_ok());
}
