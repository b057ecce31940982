use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;

use super::*;

/// Timeout that is long enough for a loaded machine.
const SOON: Duration = Duration::from_secs(20);

const HOUR: Duration = Duration::from_hours(1);

/// Limits under which no connection times out.
const PATIENT: Limits = Limits {
    headers: HOUR,
    lifetime: HOUR,
    ..LIMITS
};

/// Limits for tests that wait until a connection times out.
const SHORT: Limits = Limits {
    lifetime: Duration::from_millis(400),
    ..PATIENT
};

struct Server {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    fn start() -> Self {
        Self::with(PATIENT, Registry::default())
    }

    fn with(limits: Limits, registry: Registry) -> Self {
        let yes: Probe = Arc::new(|| true);
        Self::on(Port::new(yes.clone(), yes, Arc::new(registry), limits))
    }

    fn on(port: Arc<Port>) -> Self {
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a port");
        Self {
            address: listener.local_addr().expect("an address"),
            task: tokio::spawn(port.serve(listener)),
        }
    }

    /// Opens a connection and sends these bytes.
    async fn sent(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.expect("connected");
        stream.write_all(bytes).await.expect("sent");
        stream
    }

    /// Like `sent`, with the smallest receive buffer, for a client that does not read.
    async fn sent_by_slow_reader(&self, bytes: &[u8]) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("set");
        let mut stream = socket.connect(self.address).await.expect("connected");
        stream.write_all(bytes).await.expect("sent");
        stream
    }

    /// Sends these bytes and returns the whole response.
    async fn asked(&self, bytes: &[u8]) -> String {
        rest_of(&mut self.sent(bytes).await).await
    }

    async fn get(&self, path: &str) -> String {
        self.asked(&get(path)).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").into_bytes()
}

/// Reads until the end of the stream or a reset.
async fn rest_of(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut bytes = Vec::new();
    let read = timeout(SOON, stream.read_to_end(&mut bytes)).await;
    // Bytes received before a reset count.
    let _ = read.expect("an end in time");
    String::from_utf8(bytes).expect("text")
}

/// Sends until the server closes the connection.
async fn write_until_closed(stream: &mut (impl AsyncWrite + Unpin), pause: Duration) {
    let writing = async {
        while stream.write_all(b"1\r\na\r\n").await.is_ok() {
            sleep(pause).await;
        }
    };
    timeout(SOON, writing).await.expect("closed in time");
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or(answer)
}

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").expect("a head").1
}

/// A collector that reports how often it was encoded, with `padding` more bytes.
struct Counted {
    count: AtomicUsize,
    padding: usize,
}

impl std::fmt::Debug for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counted")
    }
}

impl Collector for Counted {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let count = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        let gauge = ConstGauge::new(i64::try_from(count).expect("few"));
        gauge.encode(encoder.encode_descriptor("made", "How often", None, gauge.metric_type())?)?;
        for i in 0..self.padding / 1000 {
            let help = "a".repeat(1000);
            gauge.encode(encoder.encode_descriptor(&format!("padding_{i}"), &help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

fn counted(padding: usize) -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Counted {
        count: AtomicUsize::new(0),
        padding,
    }));
    registry
}

/// Size of a response that exceeds the kernel's buffers.
const LARGE: usize = 4_000_000;

/// How often the registry of [`counted`] was encoded before this text.
fn number(text: &str) -> usize {
    let line = text.lines().find_map(|line| line.strip_prefix("made "));
    line.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

#[tokio::test]
async fn livez_and_readyz_run_their_own_checks() {
    for (live, ready) in [(true, true), (true, false), (false, true)] {
        let server = Server::on(Port::new(
            Arc::new(move || live),
            Arc::new(move || ready),
            Arc::default(),
            LIMITS,
        ));
        for (path, good) in [("/livez", live), ("/readyz", ready)] {
            let answer = server.get(path).await;
            assert_eq!(status(&answer), if good { "200" } else { "503" }, "{path}");
            assert_eq!(body(&answer), if good { "ok\n" } else { "unavailable\n" });
        }
    }
}

#[tokio::test]
async fn only_get_and_head_on_three_paths_are_served() {
    let server = Server::start();
    for (request, wanted) in [
        ("GET /livez?verbose HTTP/1.1\r\nhost: a\r\n\r\n", "200"),
        ("GET http://a/livez HTTP/1.1\r\nhost: a\r\n\r\n", "200"),
        ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", "404"),
        ("GET /livez/ HTTP/1.1\r\nhost: a\r\n\r\n", "404"),
        ("DELETE /livez HTTP/1.1\r\nhost: a\r\n\r\n", "405"),
        ("CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", "405"),
        ("OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", "405"),
    ] {
        let answer = server.asked(request.as_bytes()).await;
        assert_eq!(status(&answer), wanted, "{request:?}: {answer:?}");
    }
}

#[tokio::test]
async fn head_request_gets_headers_without_body() {
    let server = Server::with(PATIENT, counted(0));
    for path in ["/livez", "/metrics"] {
        let answer = server
            .asked(format!("HEAD {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes())
            .await;
        assert_eq!((status(&answer), body(&answer)), ("200", ""), "{path}");
    }
}

#[tokio::test]
async fn http_1_0_is_served() {
    let server = Server::with(PATIENT, counted(100_000));
    assert_eq!(body(&server.asked(b"GET /livez HTTP/1.0\r\n\r\n").await), "ok\n");
    let metrics = server.asked(b"GET /metrics HTTP/1.0\r\n\r\n").await;
    assert!(!metrics.contains("chunked") && body(&metrics).starts_with("# HELP made"));
}

#[tokio::test]
async fn each_scraper_gets_its_format() {
    let server = Server::with(PATIENT, counted(0));
    for (accept, kind) in [
        ("*/*", "text/plain; version=0.0.4"),
        (
            "application/openmetrics-text; version=1.0.0",
            "application/openmetrics-text",
        ),
    ] {
        let request = format!("GET /metrics HTTP/1.1\r\nhost: a\r\naccept: {accept}\r\n\r\n");
        let answer = server.asked(request.as_bytes()).await;
        assert!(answer.contains(&format!("content-type: {kind}")), "{answer}");
    }
}

#[tokio::test]
async fn connection_serves_one_request() {
    let server = Server::start();
    let answers = server.asked(&get("/livez").repeat(3)).await;
    assert_eq!(answers.matches("HTTP/1.1").count(), 1, "{answers}");
    assert!(answers.contains("connection: close"), "{answers}");
}

#[tokio::test]
async fn response_does_not_wait_for_the_request_body() {
    let server = Server::start();
    for (head, wanted) in [
        (
            "GET /livez HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000\r\n\r\na",
            "200",
        ),
        (
            "GET /livez HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\na",
            "200",
        ),
        (
            "POST /livez HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n",
            "405",
        ),
    ] {
        let answer = server.asked(head.as_bytes()).await;
        assert_eq!(status(&answer), wanted, "{head:?}");
    }
}

#[tokio::test]
async fn endless_request_body_is_cut_off() {
    let server = Server::start();
    let mut stream = server
        .sent(b"POST /livez HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    write_until_closed(&mut stream, Duration::ZERO).await;
}

#[tokio::test]
async fn slow_request_body_is_cut_off() {
    let server = Server::with(SHORT, Registry::default());
    let mut stream = server
        .sent(b"POST /livez HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
        .await;
    write_until_closed(&mut stream, Duration::from_millis(20)).await;
}

#[tokio::test]
async fn half_closed_client_gets_its_answer() {
    let server = Server::with(PATIENT, counted(LARGE));
    for path in ["/livez", "/metrics"] {
        let mut stream = server.sent(&get(path)).await;
        stream.shutdown().await.expect("half-closed");
        let answer = rest_of(&mut stream).await;
        assert_eq!(status(&answer), "200", "{path}");
        assert!(
            path == "/livez" || answer.ends_with("\r\n0\r\n\r\n"),
            "{} bytes",
            answer.len()
        );
    }
    // With an incomplete request, or none.
    for bytes in ["", "GET /livez HTT"] {
        let mut stream = server.sent(bytes.as_bytes()).await;
        stream.shutdown().await.expect("half-closed");
        assert!(!rest_of(&mut stream).await.contains("200"));
    }
}

#[tokio::test]
async fn invalid_requests_are_refused_while_probes_succeed() {
    let server = Server::start();
    let zeros = [0; 1000];
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: a\r\nx y: z\r\n\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\nSSH-2.0\r\n\r\n",
        &zeros,
    ] {
        let mut stream = server.sent(bytes).await;
        let answer = rest_of(&mut stream).await;
        assert!(!answer.contains(" 200 "), "{bytes:?}: {answer}");
        assert_eq!(status(&server.get("/livez").await), "200");
    }
}

#[tokio::test]
async fn headers_beyond_the_limit_are_refused() {
    let server = Server::start();
    for headers in [
        format!("x: {}", "a".repeat(2 * HEADERS)),
        "x: a\r\n".repeat(200),
        format!("x: {}\r\n", "a".repeat(100)).repeat(HEADERS / 100),
    ] {
        let request = format!("GET /livez HTTP/1.1\r\nhost: a\r\n{headers}\r\n\r\n");
        assert_eq!(status(&server.asked(request.as_bytes()).await), "431");
    }
    let path = format!("/{}", "a".repeat(2 * HEADERS));
    assert_ne!(status(&server.get(&path).await), "200");
}

#[tokio::test]
async fn server_stops_reading_headers_at_the_limit() {
    let server = Server::start();
    let mut stream = server.sent(b"GET /livez HTTP/1.1\r\nhost: a\r\nx: ").await;
    let endless = async {
        let mut sent = 0;
        while stream.write_all(&[b'a'; 1024]).await.is_ok() {
            sent += 1024;
        }
        sent
    };
    let sent: usize = timeout(SOON, endless).await.expect("closed in time");
    // The kernel's buffers hold the rest.
    assert!(sent < 8_000_000, "{sent} bytes");
}

#[tokio::test]
async fn unfinished_headers_are_cut_off() {
    let limits = Limits {
        headers: Duration::from_millis(200),
        ..PATIENT
    };
    let server = Server::with(limits, Registry::default());
    for bytes in ["", "G", "GET /livez HTTP/1.1\r\nhost: a\r\n"] {
        let mut stream = server.sent(bytes.as_bytes()).await;
        assert_eq!(rest_of(&mut stream).await, "", "{bytes:?}");
    }
    // Sending single bytes does not extend the deadline.
    let mut stream = server.sent(b"GET /livez HTTP/1.1\r\nx: ").await;
    let trickle = async {
        while stream.write_all(b"a").await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(SOON, trickle).await.expect("closed in time");
}

#[tokio::test]
async fn client_that_does_not_read_gets_a_reset() {
    let server = Server::with(SHORT, counted(LARGE));
    let stream = server.sent_by_slow_reader(&get("/metrics")).await;
    // Without a reset, the kernel would keep its buffer and continue to send it.
    let reset = async {
        while stream.take_error().expect("readable").is_none() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, reset).await.expect("reset in time");
}

#[tokio::test]
async fn probes_are_answered_beyond_the_limit_of_connections() {
    let limits = Limits { open: 8, ..PATIENT };
    let server = Server::with(limits, Registry::default());
    let mut open = Vec::new();
    for i in 0..100 {
        let bytes = ["", "GET /livez HTTP/1.1\r\n"][i % 2];
        open.push(server.sent(bytes.as_bytes()).await);
        assert_eq!(status(&server.get("/livez").await), "200");
    }
    // All but the last are closed.
    for mut stream in open.drain(..open.len() - 8) {
        assert_eq!(rest_of(&mut stream).await, "");
    }
}

#[tokio::test]
async fn closed_connections_do_not_count_toward_the_limit() {
    let limits = Limits { open: 8, ..PATIENT };
    let server = Server::with(limits, Registry::default());
    let mut waiting = server.sent(b"GET /livez HTTP/1.1\r\nhost: a\r\n").await;
    for _ in 0..50 {
        assert_eq!(status(&server.get("/livez").await), "200");
    }
    waiting.write_all(b"\r\n").await.expect("open");
    assert_eq!(status(&rest_of(&mut waiting).await), "200");
}

#[tokio::test]
async fn idle_connections_do_not_close_a_scrape() {
    let limits = Limits { open: 8, ..PATIENT };
    let server = Server::with(limits, counted(LARGE));
    let mut scrape = server.sent_by_slow_reader(&get("/metrics")).await;
    let mut first = [0; 100];
    scrape.read_exact(&mut first).await.expect("it began");
    let mut idle = Vec::new();
    for _ in 0..100 {
        idle.push(server.sent(b"").await);
    }
    assert_eq!(status(&server.get("/livez").await), "200");
    assert!(rest_of(&mut scrape).await.ends_with("\r\n0\r\n\r\n"));
}

#[tokio::test]
async fn slow_scrapers_close_no_other_connection() {
    let limits = Limits { scraping: 4, ..PATIENT };
    let server = Server::with(limits, counted(LARGE));
    let mut waiting = server.sent(b"GET /livez HTTP/1.1\r\nhost: a\r\n").await;
    let mut scrapes = Vec::new();
    for _ in 0..30 {
        let mut scrape = server.sent_by_slow_reader(&get("/metrics")).await;
        let mut first = [0; 100];
        scrape.read_exact(&mut first).await.expect("it began");
        scrapes.push(scrape);
        assert_eq!(status(&server.get("/livez").await), "200");
    }
    waiting.write_all(b"\r\n").await.expect("open");
    assert_eq!(status(&rest_of(&mut waiting).await), "200");
    // The oldest scrape was closed; the newest is complete.
    assert!(!rest_of(&mut scrapes[0]).await.ends_with("\r\n0\r\n\r\n"));
    assert!(rest_of(&mut scrapes[29]).await.ends_with("\r\n0\r\n\r\n"));
}

/// A collector that blocks until the test lets it continue, and panics if two scrapes run at once.
#[derive(Debug)]
struct Blocking {
    go: std::sync::Mutex<mpsc::Receiver<()>>,
    began: mpsc::Sender<()>,
}

impl Collector for Blocking {
    fn encode(&self, _: DescriptorEncoder<'_>) -> std::fmt::Result {
        self.began.send(()).expect("the test receives");
        let Ok(go) = self.go.try_lock() else {
            panic!("two scrapes run at once");
        };
        // At the end of the test, the sender is dropped and all scrapes continue.
        let _ = go.recv();
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn abandoned_scrapes_run_one_at_a_time_and_do_not_delay_probes() {
    let (go, blocked) = mpsc::channel();
    let (began, scrapes) = mpsc::channel();
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Blocking {
        go: std::sync::Mutex::new(blocked),
        began,
    }));
    let server = Server::with(SHORT, registry);
    let mut abandoned = server.sent(&get("/metrics")).await;
    scrapes.recv_timeout(SOON).expect("the first scrape began");
    // The connection ends before the scrape does.
    assert_eq!(rest_of(&mut abandoned).await, "");
    for _ in 0..5 {
        let mut next = server.sent(&get("/metrics")).await;
        assert_eq!(status(&server.get("/livez").await), "200");
        assert_eq!(rest_of(&mut next).await, "");
    }
    assert!(scrapes.try_recv().is_err(), "a second scrape began");
    drop(go);
    assert_eq!(status(&server.get("/metrics").await), "200");
}

#[tokio::test]
async fn at_most_two_texts_are_in_memory() {
    let scrapes = Scrapes::new(Arc::new(counted(0)));
    let next = async || scrapes.text().await.expect("a text");
    tokio::time::pause();
    let first = next().await;
    assert!(Arc::ptr_eq(&first, &next().await), "a fresh text is shared");
    tokio::time::advance(Duration::from_mins(1)).await;
    let second = next().await;
    assert_eq!((number(&first), number(&second)), (1, 2));
    // Clients read both texts.
    tokio::time::advance(Duration::from_mins(1)).await;
    assert_eq!(number(&next().await), 2);
    // Dropping the current text changes nothing while a client reads the older one.
    drop(second);
    tokio::time::advance(Duration::from_mins(1)).await;
    assert_eq!(number(&next().await), 2);
    drop(first);
    assert_eq!(number(&next().await), 3);
}

#[tokio::test]
async fn slow_readers_do_not_stop_new_texts() {
    let server = Server::with(SHORT, counted(LARGE));
    let mut readers = Vec::new();
    let new_texts = async {
        while number(&server.get("/metrics").await) < 5 {
            readers.push(server.sent_by_slow_reader(&get("/metrics")).await);
        }
    };
    timeout(SOON, new_texts).await.expect("new texts in time");
}

/// A collector that panics first, then returns an error, then succeeds.
#[derive(Debug)]
struct Failing(AtomicUsize);

impl Collector for Failing {
    fn encode(&self, _: DescriptorEncoder<'_>) -> std::fmt::Result {
        match self.0.fetch_add(1, Ordering::SeqCst) {
            0 => panic!("a bug"),
            1 => Err(std::fmt::Error),
            _ => Ok(()),
        }
    }
}

#[tokio::test]
async fn scrape_succeeds_after_failed_ones() {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Failing(AtomicUsize::new(0))));
    let server = Server::with(PATIENT, registry);
    for wanted in ["500", "500", "200"] {
        assert_eq!(status(&server.get("/metrics").await), wanted);
    }
}

#[tokio::test]
async fn ipv6_address_is_served() {
    let Ok(listener) = listen("[::1]:0".parse().expect("an address")) else {
        return; // This machine has no IPv6.
    };
    let address = listener.local_addr().expect("an address");
    let yes: Probe = Arc::new(|| true);
    let task = tokio::spawn(serve(listener, yes.clone(), yes, Arc::default()));
    let mut stream = TcpStream::connect(address).await.expect("connected");
    stream.write_all(&get("/readyz")).await.expect("sent");
    assert_eq!(body(&rest_of(&mut stream).await), "ok\n");
    task.abort();
}
