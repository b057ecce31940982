//! Answers of a broken proxy or an attacker, which ZITADEL itself never sends. Each must end in bounded time and memory
//! with the right reason (docs/adr/0019-assertions-go-only-to-the-configured-host.md). A plain socket sends the answers
//! that the stand-in's HTTP server cannot produce.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde_json::json;
use zitadel_tokens::domain::failure::{Failure, classify};
use zitadel_tokens::domain::key::ServiceKey;
use zitadel_tokens::domain::reason::Reason;
use zitadel_tokens::zitadel::Settings;

use super::client::{connect, exchange, settings};
use super::only_stand_in::{DISCOVERY, TOKEN, World, user};
use super::support::issuer::Issuer;

/// A valid answer to a token request.
const GOOD: &str = r#"{"access_token":"a.b.c.d.e","token_type":"Bearer","expires_in":60}"#;

/// [`GOOD`], compressed with `gzip`.
const GOOD_GZIP: &str =
    "H4sIAAAAAAACA6tWSkxOTi0uji/Jz07NU7JSStRL0kvWS9FLVdJRAovFl1QWpAIlnFITi1KLgKKpFQWZRanF8ZlA5WYGtQDe8/J+QgAAAA==";

/// Timeout of one request, long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(3);

fn impatient(url: &str) -> Settings {
    Settings {
        timeout: TIMEOUT,
        ..settings(url)
    }
}

/// A server that answers discovery correctly and a token request with the bytes that a case supplies.
struct Socket {
    url: String,
    /// The requests, each up to the first empty line.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Socket {
    /// The threads end with the test process.
    fn answering(answer: impl Fn(&mut TcpStream) -> std::io::Result<()> + Clone + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let document = json!({"issuer": url, "token_endpoint": format!("{url}{TOKEN}")}).to_string();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let kept = asked.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                let (mut connection, answer) = (connection.expect("a connection"), answer.clone());
                let (document, kept) = (document.clone(), kept.clone());
                std::thread::spawn(move || {
                    let head = head(&mut connection);
                    let is_discovery = head.contains(DISCOVERY);
                    kept.lock().expect("not poisoned").push(head);
                    // An error means that the client has closed the connection.
                    let _ = if is_discovery {
                        connection.write_all(ok("", &document).as_bytes())
                    } else {
                        answer(&mut connection)
                    };
                    // Read the rest of the request: closing the socket with unread data would send a reset.
                    let _ = connection.shutdown(std::net::Shutdown::Write);
                    let _ = connection.set_read_timeout(Some(TIMEOUT));
                    let _ = connection.read(&mut [0; 4 * 1024]);
                });
            }
        });
        Self { url, asked }
    }
}

/// The head of a request.
fn head(connection: &mut TcpStream) -> String {
    let mut read = Vec::new();
    let mut byte = [0];
    while !read.ends_with(b"\r\n\r\n") && connection.read(&mut byte).is_ok_and(|n| n == 1) {
        read.push(byte[0]);
    }
    String::from_utf8_lossy(&read).to_lowercase()
}

/// A complete answer with status 200.
fn ok(headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}")
}

/// The outcome of a token request with this answer, and how long it takes.
async fn asked(
    key: &ServiceKey,
    answer: impl Fn(&mut TcpStream) -> std::io::Result<()> + Clone + Send + 'static,
) -> (Result<(), Failure>, Duration) {
    let socket = Socket::answering(answer);
    let instance = connect(impatient(&socket.url));
    instance.discover().await.expect("discovered");
    let started = Instant::now();
    let outcome = instance.exchange(key, "openid").await.map(drop);
    (outcome, started.elapsed())
}

async fn a_key() -> ServiceKey {
    user(&Issuer::start(&[]), "JWT").await
}

/// Writes `first`, then `then` repeatedly with a pause between.
fn drip(connection: &mut TcpStream, first: &str, then: &str, pause: Duration) -> std::io::Result<()> {
    connection.write_all(first.as_bytes())?;
    let many = then.repeat(if pause.is_zero() { 1_000 } else { 1 });
    loop {
        connection.write_all(many.as_bytes())?;
        std::thread::sleep(pause);
    }
}

/// The timeout covers the whole request. A server that keeps sending cannot extend it.
#[tokio::test(flavor = "multi_thread")]
async fn an_endless_answer_ends_in_time() {
    const HINT: &str = "HTTP/1.1 103 Early Hints\r\n\r\n";
    const START: &str = "HTTP/1.1 200 OK\r\n";
    const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunk = format!("400\r\n{}\r\n", " ".repeat(0x400));
    let (slow, fast) = (Duration::from_millis(20), Duration::ZERO);
    let (late, malformed) = (Err(Failure::Timeout), Err(Failure::Malformed));
    let key = a_key().await;
    let table = [
        ("the first line, slowly", "HTTP/1.1 200 ", "O", slow, late),
        ("headers, slowly", START, "a: b\r\n", slow, late),
        ("one header, slowly", "HTTP/1.1 200 OK\r\na: ", "b", slow, late),
        ("headers, fast", START, "a: b\r\n", fast, malformed),
        ("one header, fast", "HTTP/1.1 200 OK\r\na: ", "b", fast, malformed),
        ("hints, slowly", "", HINT, slow, late),
        ("a body, slowly", CHUNKED, "1\r\n \r\n", slow, late),
        ("a body, fast", CHUNKED, &chunk, fast, malformed),
        (
            "a body up to the end of the connection",
            "HTTP/1.1 200 OK\r\n\r\n",
            " ",
            fast,
            malformed,
        ),
        ("a chunk's length, slowly", CHUNKED, "0", slow, late),
        (
            "trailers without end",
            &format!("{CHUNKED}0\r\n"),
            "a: b\r\n",
            fast,
            malformed,
        ),
    ];
    // Concurrently, because most of them wait for the timeout.
    let all = table.map(|(name, first, then, pause, expected)| {
        let (key, first, then) = (&key, first.to_owned(), then.to_owned());
        async move {
            let (outcome, took) = asked(key, move |c| drip(c, &first, &then, pause)).await;
            assert_eq!(outcome, expected, "{name} after {took:?}");
            assert!(took < 4 * TIMEOUT, "{name}: {took:?}");
        }
    });
    futures::future::join_all(all).await;
}

/// CPU time of this process.
fn worked() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).expect("not negative")
}

/// Peak and current memory of this process, in KiB.
fn memory() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).expect(name);
        line.split_whitespace()
            .nth(1)
            .and_then(|n| n.parse().ok())
            .expect("a number")
    };
    (field("VmHWM:"), field("VmRSS:"))
}

/// CPU time and memory are counted for each process, so the measurement runs in a process of its own.
#[test]
fn a_body_of_a_gibibyte_costs_little_time_and_memory() {
    let alone = [
        "hostile::eight_bodies_of_a_gibibyte",
        "--exact",
        "--ignored",
        "--nocapture",
    ];
    let this = std::env::current_exe().expect("a path");
    let output = Command::new(this).args(alone).output().expect("it runs");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    // If the test is renamed, the child process runs no test and still succeeds.
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    print!("{said}");
}

#[tokio::test]
#[ignore = "a_body_of_a_gibibyte_costs_little_time_and_memory runs it in a process of its own"]
async fn eight_bodies_of_a_gibibyte() {
    let world = World::new().await;
    world.instance.discover().await.expect("discovered");
    let (_, before) = memory();
    for path in [TOKEN, DISCOVERY] {
        let endless = json!({"path": path, "times": 8, "status": 200, "body": GOOD, "repeatBodyBytes": 1 << 30});
        world.issuer.fault(endless).await;
        let ask = async || {
            if path == TOKEN {
                world.instance.exchange(&world.key, "openid").await.map(drop)
            } else {
                world.instance.discover().await.map(drop)
            }
        };
        let start = worked();
        for outcome in futures::future::join_all((0..8).map(|_| ask())).await {
            assert_eq!(outcome, Err(Failure::Malformed), "{path}");
        }
        let took = worked().saturating_sub(start);
        println!("{path}: {took:?} of CPU time");
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
    let (peak, _) = memory();
    println!("from {before} KiB to {peak} KiB");
    assert!(
        peak.saturating_sub(before) < 32 * 1024,
        "from {before} KiB to {peak} KiB"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_http_and_a_missing_answer_are_different_failures() {
    let key = a_key().await;
    let malformed = Err(Failure::Malformed);
    let table = [
        ("another protocol", "SSH-2.0-OpenSSH_9.6\r\n\r\n".to_owned(), malformed),
        (
            "a TLS alert",
            "\u{15}\u{3}\u{1}\0\u{2}\u{2}\u{16}\r\n\r\n".to_owned(),
            malformed,
        ),
        (
            "a status that is not a number",
            "HTTP/1.1 yes OK\r\n\r\n".to_owned(),
            malformed,
        ),
        ("a header without a name", ok(": x\r\n", GOOD), malformed),
        ("a header with a null", ok("a: \0\r\n", GOOD), malformed),
        ("two lengths", ok("Content-Length: 1\r\n", GOOD), malformed),
        ("a negative length", ok("Content-Length: -1\r\n", GOOD), malformed),
        (
            "a length that overflows",
            ok("", "").replace(": 0", ": 99999999999999999999"),
            malformed,
        ),
        (
            "a length beyond the body",
            ok("", GOOD).replace("Content-Length: 6", "Content-Length: 9"),
            malformed,
        ),
        (
            "a header of a mebibyte",
            ok(&format!("a: {}\r\n", "b".repeat(1 << 20)), GOOD),
            malformed,
        ),
        ("a thousand headers", ok(&"a: b\r\n".repeat(1_000), GOOD), malformed),
        (
            "a chunk with an invalid length",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n".to_owned(),
            malformed,
        ),
        (
            "a chunk length that overflows",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n".to_owned(),
            malformed,
        ),
        ("nothing", String::new(), Err(Failure::Broken)),
        ("a valid answer", ok("", GOOD), Ok(())),
        ("ninety headers", ok(&"a: b\r\n".repeat(90), GOOD), Ok(())),
        (
            "hints before the answer",
            "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(10) + &ok("", GOOD),
            Ok(()),
        ),
    ];
    for (name, answer, expected) in table {
        let (outcome, took) = asked(&key, move |c| c.write_all(answer.as_bytes())).await;
        assert_eq!(outcome, expected, "{name}");
        assert!(took < TIMEOUT, "{name}: {took:?}");
    }
    // A protocol switch that the client did not request.
    let upgrade = "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n";
    let (outcome, _) = asked(&key, |c| c.write_all(upgrade.as_bytes())).await;
    assert_eq!(
        classify(outcome.expect_err("no answer"), true),
        Reason::MalformedResponse
    );
}

/// A second answer on the connection must not count as the answer to the next request.
#[tokio::test(flavor = "multi_thread")]
async fn an_unsolicited_answer_is_ignored() {
    let planted = GOOD.replace("a.b", "planted");
    let key = a_key().await;
    let socket = Socket::answering(move |c| {
        let two = [ok("", GOOD), ok("", &planted)].concat();
        c.write_all(two.replace("Connection: close\r\n", "").as_bytes())
    });
    let instance = connect(impatient(&socket.url));
    for _ in 0..5 {
        let got = exchange(&instance, &key, "openid").await.expect("a token");
        let token = secrecy::ExposeSecret::expose_secret(&got.answer.access_token).to_owned();
        assert_eq!(token, "a.b.c.d.e");
    }
}

/// The client requests no encoding and decompresses nothing. A compressed answer is therefore invalid JSON.
#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_answer_is_not_decompressed() {
    let world = World::new().await;
    let fault = json!({"path": TOKEN, "times": 1, "status": 200, "bodyBase64": GOOD_GZIP, "headers": {"Content-Encoding": "gzip"}});
    world.issuer.fault(fault).await;
    assert_eq!(world.mint().await.err(), Some(Reason::MalformedResponse));

    let socket = Socket::answering(|c| c.write_all(ok("", GOOD).as_bytes()));
    let instance = connect(impatient(&socket.url));
    exchange(&instance, &world.key, "openid").await.expect("a token");
    let asked = socket.asked.lock().expect("not poisoned");
    assert_eq!(asked.len(), 2);
    assert!(asked.iter().all(|head| !head.contains("accept-encoding")), "{asked:?}");
}

/// The body counts, whatever its `Content-Type`. A body with two possible interpretations is refused.
#[tokio::test]
async fn an_ambiguous_body_is_refused() {
    let world = World::new().await;
    let malformed = Some(Reason::MalformedResponse);
    let with = |field: &str| GOOD.replace('}', &format!(",{field}}}"));
    let table = [
        ("two tokens", with(r#""access_token":"f.g.h.i.j""#), malformed),
        ("one token twice", with(r#""access_token":"a.b.c.d.e""#), malformed),
        ("two lifetimes", with(r#""expires_in":600"#), malformed),
        ("two token types", with(r#""token_type":"Bearer""#), malformed),
        (
            "a name with an escape",
            with(r#""access\u005ftoken":"f.g.h.i.j""#),
            malformed,
        ),
        ("two answers", GOOD.repeat(2), malformed),
        ("text before the answer", format!("while(1);{GOOD}"), malformed),
        ("a byte order mark", format!("\u{feff}{GOOD}"), malformed),
        ("a missing field", GOOD.replace("token_type", "Token_Type"), malformed),
        ("null as token", GOOD.replace(r#""a.b.c.d.e""#, "null"), malformed),
        (
            "a list as token",
            GOOD.replace(r#""a.b.c.d.e""#, r#"["a.b.c.d.e"]"#),
            malformed,
        ),
        ("a token with a null", GOOD.replace("a.b", r"a\u0000b"), malformed),
        ("half a surrogate", GOOD.replace("a.b", r"a\ud800b"), malformed),
        (
            "a token of a mebibyte",
            GOOD.replace("a.b", &"a".repeat(1 << 20)),
            malformed,
        ),
        (
            "a deeply nested lifetime",
            GOOD.replace("60", &"[".repeat(100_000)),
            malformed,
        ),
        (
            "a deeply nested unknown field, unclosed",
            with(&format!(r#""x":{}"#, "[".repeat(100_000))),
            malformed,
        ),
        (
            "a deeply nested unknown field, closed",
            with(&format!(r#""x":{}{}"#, "[".repeat(100_000), "]".repeat(100_000))),
            None,
        ),
        (
            "unknown fields",
            with(r#""scope":"openid","scope":"x","id_token":null"#),
            None,
        ),
    ];
    for (name, body, reason) in table {
        assert_eq!(world.judge(body).await.err(), reason, "{name}");
    }
    for kind in [
        "text/html; charset=utf-16",
        "application/jwt",
        "",
        "image/png, multipart/mixed",
    ] {
        let fault = json!({"path": TOKEN, "times": 1, "status": 200, "body": GOOD, "headers": {"Content-Type": kind}});
        world.issuer.fault(fault).await;
        assert!(world.mint().await.is_ok(), "{kind}");
    }
    let not_utf8 = [&GOOD.as_bytes()[..20], b"\xff\xfe", &GOOD.as_bytes()[20..]].concat();
    let body = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, not_utf8);
    world
        .issuer
        .fault(json!({"path": TOKEN, "times": 1, "status": 200, "bodyBase64": body}))
        .await;
    assert_eq!(world.mint().await.err(), malformed);
}

/// An OAuth error body refines the status. Any other body does not change what the status means.
#[tokio::test]
async fn a_status_counts_whatever_its_body_is() {
    let world = World::new().await;
    world.instance.discover().await.expect("discovered");
    let oauth = |text: &str| format!(r#"{{"error":"invalid_grant","error_description":"{text}"}}"#);
    let table = [
        (429, " ".to_owned(), 1 << 30, Reason::RateLimited),
        (503, "<html>".to_owned(), 1 << 30, Reason::ServerError),
        (400, "<html>".to_owned(), 1 << 30, Reason::MalformedResponse),
        (429, oauth("x"), 0, Reason::RateLimited),
        (400, oauth(r"\u0000\r\n\u001b[31m"), 0, Reason::KeyRejected),
        (400, oauth(r#"","error":"server_error"#), 0, Reason::MalformedResponse),
        (
            400,
            r#"{"error":["invalid_grant"]}"#.to_owned(),
            0,
            Reason::MalformedResponse,
        ),
        (599, oauth("x").replace("invalid_grant", "x"), 0, Reason::ServerError),
        (201, GOOD.to_owned(), 0, Reason::MalformedResponse),
        (206, GOOD.to_owned(), 0, Reason::MalformedResponse),
        (204, String::new(), 0, Reason::MalformedResponse),
        (304, String::new(), 0, Reason::MalformedResponse),
    ];
    for (status, body, length, reason) in table {
        let name = format!("{status} {body}");
        let fault = json!({
            "path": TOKEN, "times": 1, "status": status, "body": body, "repeatBodyBytes": length,
            "headers": {"Retry-After": "7"},
        });
        world.issuer.fault(fault).await;
        let outcome = world.instance.exchange(&world.key, "openid").await.map(drop);
        let failure = outcome.expect_err("no token");
        assert_eq!(classify(failure, true), reason, "{name}");
        assert!(
            matches!(
                failure,
                Failure::Status {
                    retry_after: Some(_),
                    ..
                }
            ),
            "{name}"
        );
    }
}

/// A `Date` header can hold any time. Adding `Retry-After: 7` to the latest representable second once panicked
/// (docs/adr/0011-times-follow-the-servers-clock.md).
#[tokio::test]
async fn the_latest_representable_date_is_an_error_and_not_a_panic() {
    let late = "Thu, 30 Dec 9999 21:59:59 GMT";
    let wrong_date = |path| json!({"path": path, "headers": {"Date": late, "Retry-After": "7"}});
    let world = World::new().await;
    world.issuer.fault(wrong_date(DISCOVERY)).await;
    for _ in 0..2 {
        assert_eq!(world.mint().await.err(), Some(Reason::ClockSkew));
    }
    assert_eq!(world.token_requests().await.len(), 0, "nothing is signed");

    // Only the token endpoint sends the wrong date. Two answers prove it, so the second token is dropped.
    let world = World::new().await;
    world.issuer.fault(wrong_date(TOKEN)).await;
    assert!(world.mint().await.is_ok(), "one answer proves nothing");
    assert_eq!(world.mint().await.err(), Some(Reason::ClockSkew));
}
