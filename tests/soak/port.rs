//! Attacks on the operator's port by a pod that can reach it. With the chart's memory limit and 1,024 file descriptors,
//! the operator must survive, answer its probes and refresh tokens.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use serde_json::{Value, json};

use crate::reduced;
use crate::support::operator::Operator;
use crate::support::world::{PROJECT, World};

/// The memory limit of the chart.
const MEMORY: u64 = 256 << 20;

/// Maximum memory of all connections to the port, including the kernel's share.
const PORT_MEMORY: u64 = 24 << 20;

/// The kubelet's default timeout. The chart gives it five seconds.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

const PROBE_INTERVAL: Duration = Duration::from_millis(100);

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_headers_cost_little_memory() {
    under_attack(
        "860 connections with 380 kB of headers",
        0,
        |Target { port, .. }| {
            let headers = format!("GET /metrics HTTP/1.1\r\nhost: a\r\nx: {}", "a".repeat(380_000));
            let open: Vec<_> = (0..860).map(|_| sent(port, headers.as_bytes())).collect();
            std::thread::sleep(Duration::from_secs(3));
            drop(open);
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_leave_room_for_probes() {
    under_attack("1,000 and 3,000 idle connections", 0, |Target { port, .. }| {
        for count in [1_000, 3_000] {
            let open: Vec<_> = (0..count).map(|_| sent(port, b"")).collect();
            std::thread::sleep(Duration::from_secs(3));
            drop(open);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_without_pause_leave_room_for_probes() {
    under_attack("connections without pause", 0, |Target { port, .. }| {
        let until = Instant::now() + attack_time();
        let mut count = 0;
        let mut open = VecDeque::new();
        while Instant::now() < until {
            open.push_back(sent(port, b"GET /livez HTTP/1.1\r\n"));
            count += 1;
            if open.len() > 500 {
                open.pop_front();
            }
        }
        println!(
            "{:.0} connections per second",
            f64::from(count) / attack_time().as_secs_f64()
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_without_pause_leave_room_for_probes() {
    under_attack("requests without pause", 100, |Target { port, .. }| {
        let until = Instant::now() + attack_time();
        let mut count = 0;
        while Instant::now() < until {
            let path = ["livez", "metrics"][usize::from(count % 2 == 0)];
            let mut stream = sent(port, format!("GET /{path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes());
            if let Some(stream) = &mut stream {
                // The operator may have closed the connection in favour of a newer one.
                let _ = stream.read_to_end(&mut Vec::new());
            }
            count += 1_u32;
        }
        println!(
            "{:.0} requests per second",
            f64::from(count) / attack_time().as_secs_f64()
        );
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_readers_of_metrics_cost_little_memory() {
    // Longer than the lifetime of a connection, and much longer than that of a metrics text.
    let objects = if reduced() { 200 } else { 1_000 };
    under_attack("slow readers of /metrics", objects, |Target { port, .. }| {
        let until = Instant::now() + Duration::from_secs(20);
        let mut open = Vec::new();
        while Instant::now() < until {
            open.push(sent(port, b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n"));
            std::thread::sleep(Duration::from_millis(50));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_are_answered_without_free_descriptors() {
    under_attack("no descriptors", 0, |Target { pid, port }| {
        let Some(used) = descriptors(pid) else {
            return println!("skipped: only root can read and limit the operator's file descriptors");
        };
        // As if connections to the API server and ZITADEL used all but four descriptors.
        let unused = (0..1_024).filter(|n| !used.contains(n));
        limit_descriptors(pid, unused.take(4).last().expect("a number") + 1);
        let open: Vec<_> = (0..200).map(|_| sent(port, b"")).collect();
        std::thread::sleep(Duration::from_secs(3));
        drop(open);
        limit_descriptors(pid, 1_024);
    })
    .await;
}

/// The open file descriptors of a process. Only root can read those of the operator, which is not dumpable.
fn descriptors(pid: u32) -> Option<BTreeSet<u32>> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let names = open.filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.parse().ok());
    Some(names.collect())
}

fn limit_descriptors(pid: u32, count: u32) {
    let mut prlimit = std::process::Command::new("prlimit");
    let set = prlimit
        .args(["--pid", &pid.to_string(), &format!("--nofile={count}:1024")])
        .status();
    assert!(set.expect("prlimit runs").success());
}

/// The operator under attack.
#[derive(Clone, Copy)]
struct Target {
    pid: u32,
    port: SocketAddr,
}

fn attack_time() -> Duration {
    Duration::from_secs(if reduced() { 5 } else { 20 })
}

/// Opens a connection and sends `bytes`. `None` if the operator closed the connection first.
fn sent(port: SocketAddr, bytes: &[u8]) -> Option<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&port, Duration::from_secs(5)).ok()?;
    // Wait only briefly: the operator may have stopped reading.
    stream
        .set_write_timeout(Some(Duration::from_millis(100)))
        .expect("a timeout");
    stream
        .set_read_timeout(Some(Duration::from_secs(5)))
        .expect("a timeout");
    match stream.write_all(bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => None,
        _ => Some(stream),
    }
}

/// Runs `attack` on an operator with `objects` service users and one more with a token. The token is refreshed during
/// the attack and after it.
async fn under_attack(name: &str, objects: usize, attack: impl FnOnce(Target) + Send + 'static) {
    // This process holds the client end of all connections.
    zitadel_tokens::ops::descriptors::raise_limit().expect("raised");
    let world = World::new("port").await;
    let operator = Operator::start_limited(world.cluster, &world.selector(), MEMORY).await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.token("billing-token").await;
    fleet(&world, objects).await;

    let port: SocketAddr = operator.address().parse().expect("an address");
    let target = Target {
        pid: operator.pid,
        port,
    };
    let going = Arc::new(AtomicBool::new(true));
    let probes = std::thread::spawn({
        let going = going.clone();
        move || probe_while(target, &going)
    });
    let text = operator.get("/metrics").await.1.len() as u64;
    let before = operator.peak_memory();
    let attack = std::thread::spawn(move || attack(target));
    let refresh = refreshed(&world, "during").await;
    while !attack.is_finished() {
        assert!(!probes.is_finished(), "a probe failed; see the panic of its thread");
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
    attack.join().expect("attacked");
    going.store(false, Ordering::Relaxed);
    let seen = probes.join().expect("all probes are answered");
    let peak = operator.peak_memory();
    println!(
        "{name}: {seen:?}; refresh took {refresh:?}; peak memory {} KiB before, {} KiB after; metrics {} KiB",
        before / 1024,
        peak / 1024,
        text / 1024
    );
    // 128 connections, a few that the operator is about to close, and those to the API server and ZITADEL.
    assert!(seen.descriptors < 256, "{seen:?}");
    // The operator's limits: 128 connections of about 40 KiB, and two metrics texts, each in a buffer of up to twice
    // its size.
    assert!(peak <= MEMORY && peak < before + 4 * text + PORT_MEMORY, "{peak} bytes");

    refreshed(&world, "after").await;
    assert_eq!(operator.get("/metrics").await.0, 200);
    operator.terminate().await;
}

/// Requests a refresh and waits for the new token.
async fn refreshed(world: &World, request: &str) -> Duration {
    let asked = Instant::now();
    let before = world.token("billing-token").await;
    world.annotate("billing", "renew-request", request).await;
    world
        .secret_until("billing-token", |data| data["token"] != before)
        .await;
    asked.elapsed()
}

/// Service users with names of maximum length, 16 tokens and no key: they produce a large `/metrics` text.
async fn fleet(world: &World, objects: usize) {
    let tokens: Vec<Value> = (0..16)
        .map(
            |i| json!({"name": format!("token-{i:a<50}"), "projectIDs": [PROJECT], "secret": {"name": format!("none-{i}")}}),
        )
        .collect();
    let spec = json!({"tokens": tokens, "keySecretRef": {"name": "none"}});
    let name = |i: usize| format!("user-{i:a<58}");
    stream::iter(0..objects)
        .for_each_concurrent(8, async |i| {
            world.service_user(&name(i), spec.clone()).await.expect("accepted");
        })
        .await;
    for i in 0..objects {
        world.ready(&name(i), "False", "KeySecretMissing").await;
    }
}

/// What the probes observed during an attack.
#[derive(Debug, Default)]
struct Seen {
    probes: u32,
    slowest: Duration,
    /// Maximum number of open file descriptors; 0 if they cannot be read.
    descriptors: usize,
}

/// Probes `/livez` and `/readyz` like the kubelet, with a new connection each time.
fn probe_while(target: Target, going: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    while going.load(Ordering::Relaxed) {
        for path in ["/livez", "/readyz"] {
            let asked = Instant::now();
            let answer = probe(target.port, path);
            let took = asked.elapsed();
            let answer = answer.unwrap_or_else(|error| panic!("{path} after {took:?}: {error}"));
            assert!(answer.starts_with("HTTP/1.1 200 "), "{path}: {answer}");
            assert!(took < PROBE_TIMEOUT, "{path} took {took:?}");
            seen.slowest = seen.slowest.max(took);
            seen.probes += 1;
        }
        let open = descriptors(target.pid).map_or(0, |open| open.len());
        seen.descriptors = seen.descriptors.max(open);
        std::thread::sleep(PROBE_INTERVAL);
    }
    seen
}

fn probe(port: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&port, PROBE_TIMEOUT)?;
    stream.set_read_timeout(Some(PROBE_TIMEOUT))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {port}\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
