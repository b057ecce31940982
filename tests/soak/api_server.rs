//! The API server restarts, is unreachable, stops answering, or lacks the operator's CRDs.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Namespace, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::DeleteParams;
use kube::runtime::wait::await_condition;
use serde_json::json;

use crate::reduced;
use crate::sampler::sample;
use crate::support::cluster::{Cluster, install_crds};
use crate::support::issuer::Issuer;
use crate::support::operator::Operator;
use crate::support::proxy::Proxy;
use crate::support::world::{World, everything, until};
use crate::support::{EVENTUALLY, eventually};

/// Number of service users whose tokens all become due during the outage.
const USERS: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn tokens_due_during_an_api_server_outage_are_refreshed_once_and_in_time() {
    for silent in [false, true] {
        let (lifetime, outage_seconds) = if reduced() { (60, 12) } else { (300, 60) };
        let world = World::new("away").await;
        let proxy = Proxy::start(world.cluster, &world.name).await;
        let _operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
        world.instance().await;
        let started = Instant::now();
        let mut names = Vec::new();
        for i in 0..USERS {
            let name = format!("user-{i}");
            let fields = json!({"tokenType": "JWT", "lifetimeSeconds": lifetime});
            world.simple(&name, fields).await;
            names.push(format!("{name}-token"));
        }
        for i in 0..USERS {
            world.ready(&format!("user-{i}"), "True", "Issued").await;
        }
        assert_eq!(world.issuer.mints().await, USERS);
        // A token is due at two thirds of its lifetime, minus a jitter of up to a tenth: from 56 % on.
        let outage_starts = Duration::from_secs(lifetime * 55 / 100);
        let outage_ends = outage_starts + Duration::from_secs(outage_seconds);
        let outage = async {
            tokio::time::sleep(outage_starts.saturating_sub(started.elapsed())).await;
            if silent {
                proxy.silence();
            } else {
                proxy.refuse("");
            }
            tokio::time::sleep(outage_ends.saturating_sub(started.elapsed())).await;
            assert_eq!(
                world.issuer.mints().await,
                USERS,
                "a token was requested that could not be written"
            );
            proxy.open();
            let back = Instant::now();
            eventually("all tokens are refreshed", async || {
                world.issuer.mints().await == 2 * USERS
            })
            .await;
            back.elapsed()
        };
        let going = || started.elapsed() < Duration::from_secs(lifetime);
        let (seen, took) = tokio::join!(sample(&world, &names, going), outage);
        println!(
            "API server {} for {outage_seconds} s, token lifetime {lifetime} s: {USERS} due tokens refreshed {:.1} s \
             after the outage; {seen}",
            if silent { "silent" } else { "unreachable" },
            took.as_secs_f64()
        );
        world.sentinel().await;
        assert_eq!(world.issuer.mints().await, 2 * USERS);
    }
}

/// A dead connection reports no error, so every call and every watch has its own deadline.
#[tokio::test(flavor = "multi_thread")]
async fn unanswered_calls_and_watches_time_out() {
    tokio::join!(lost_calls(), dead_watches());
}

async fn lost_calls() {
    let world = World::new("lost").await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let mut operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
    world.instance().await;
    for (method, path, step) in [
        (
            "GET",
            "/secrets/get-key",
            "could not read the state of the service user",
        ),
        ("PATCH", "/secrets/patch-token", "written"),
        ("PUT", "/put/status", "written"),
    ] {
        let (started, name) = (Instant::now(), method.to_lowercase());
        proxy.lose(method, path);
        world.simple(&name, json!({"tokenType": "JWT"})).await;
        operator
            .await_line(&format!("{step} object={}/{name} ", world.name))
            .await;
        println!("{method}: timed out after {:.1} s", started.elapsed().as_secs_f64());
        proxy.find();
        world.ready(&name, "True", "Issued").await;
    }
    assert_eq!(world.issuer.mints().await, 3);
}

async fn dead_watches() {
    let world = World::new("dead").await;
    let proxy = Proxy::start(world.cluster, &world.name).await;
    let _operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
    world.instance().await;
    world.instance_ready("True", "InstanceReady").await;
    let started = Instant::now();
    proxy.deaden();
    world.simple("unseen", json!({"tokenType": "JWT"})).await;
    until(world.secrets(), "unseen-token", 3 * EVENTUALLY, |s: &Secret| {
        s.data.is_some()
    })
    .await;
    println!(
        "dead watches are restarted after {:.0} s",
        started.elapsed().as_secs_f64()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn api_server_restarts_cost_no_extra_token() {
    // A token is due at least a third of its lifetime before it expires: 19 s. In that time the outage must end (2 s
    // plus the start of the server) and a backoff of up to 12 s must run.
    let lifetime = 60;
    let restarts = if reduced() { 3 } else { 15 };
    let world = World::new("restart").await;
    let mut server = Server::new(world.cluster);
    server.start();
    let proxy = Proxy::before(world.cluster, &server.url, &world.name).await;
    proxy.reached().await;
    let _operator = Operator::start_with(&proxy.kubeconfig, &world.selector(), &[]).await;
    world.instance().await;
    let mut names = Vec::new();
    for i in 0..USERS {
        let name = format!("user-{i}");
        let fields = json!({"tokenType": "JWT", "lifetimeSeconds": lifetime});
        world.simple(&name, fields).await;
        names.push(format!("{name}-token"));
    }
    for name in &names {
        world.token(name).await;
    }
    let restarting = AtomicBool::new(true);
    let restart = async {
        for _ in 0..restarts {
            // Just before the first tokens are due.
            tokio::time::sleep(Duration::from_secs(lifetime * 55 / 100)).await;
            server.kill();
            tokio::time::sleep(Duration::from_secs(2)).await;
            server.start();
            proxy.reached().await;
        }
        restarting.store(false, Ordering::Relaxed);
    };
    let (seen, ()) = tokio::join!(sample(&world, &names, || restarting.load(Ordering::Relaxed)), restart);
    let mints = world.issuer.mints().await;
    println!("{restarts} restarts, {mints} token requests; {seen}");
    // The sampler may miss tokens that were issued at the very end.
    assert!(
        (seen.tokens..=seen.tokens + names.len()).contains(&mints),
        "{mints} token requests"
    );
}

/// This test is in the soak suite because it stops the controller manager, which other tests need.
#[tokio::test(flavor = "multi_thread")]
async fn no_token_is_requested_in_a_terminating_namespace() {
    let world = World::new("ending").await;
    let operator = world.operator().await;
    world.instance_for_all().await;
    let ending = World::beside(&world, "ending").await;
    ending.simple("billing", json!({"tokenType": "JWT"})).await;
    ending.ready("billing", "True", "Issued").await;
    let namespaces: Api<Namespace> = Api::all(world.client.clone());
    {
        // The namespace controller deletes objects in no fixed order. Here the Secret is deleted and the service user
        // stays.
        let _stopped = Stopped::new(world.cluster, "kube-controller-manager");
        let deleted = namespaces.delete(&ending.name, &DeleteParams::default()).await;
        deleted.expect("deletion starts");
        let deleted = ending.secrets().delete("billing-token", &DeleteParams::default()).await;
        deleted.expect("deleted");
        world.sentinel().await;
        assert_eq!(world.issuer.mints().await, 1);
    }
    let gone = await_condition(namespaces, &ending.name, |n: Option<&Namespace>| n.is_none());
    let gone = tokio::time::timeout(EVENTUALLY, gone).await;
    gone.expect("gone in time").expect("watched");
    world.sentinel().await;
    assert_eq!(world.issuer.mints().await, 1);
    let log = operator.log();
    assert!(log.iter().all(|l| !l.contains("panic")), "{log:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_waits_for_its_crds() {
    let cluster: &'static Cluster = Box::leak(Box::new(Cluster::start()));
    let world = World::without_policy(cluster, "kinds", Issuer::start(&[])).await;
    let mut operator = Operator::spawn(&cluster.kubeconfig, &world.selector(), &[], &[]);
    let unknown = "kind=ZitadelServiceUser error=\"the API server does not know this kind";
    operator.await_line(unknown).await;
    let health = async || (operator.get("/livez").await.0, operator.get("/readyz").await.0);
    assert_eq!(health().await, (200, 503));
    install_crds(&world.client).await;
    eventually("the operator is ready", async || health().await == (200, 200)).await;
    world.allow(world.selector_of_namespace(), everything()).await;
    world.instance().await;
    world.simple("billing", json!({"tokenType": "JWT"})).await;
    world.ready("billing", "True", "Issued").await;

    // The CRDs are deleted together with all their objects, and installed again.
    let crds: Api<CustomResourceDefinition> = Api::all(world.client.clone());
    for crd in zitadel_tokens::api::crds() {
        let name = crd.metadata.name.expect("a name");
        crds.delete(&name, &DeleteParams::default()).await.expect("deleted");
        let gone = await_condition(crds.clone(), &name, |crd: Option<&CustomResourceDefinition>| {
            crd.is_none()
        });
        let gone = tokio::time::timeout(EVENTUALLY, gone).await;
        gone.expect("gone in time").expect("watched");
    }
    let lines = operator.log().iter().filter(|l| l.contains(unknown)).count();
    eventually("the watch has failed", async || {
        operator.log().iter().filter(|l| l.contains(unknown)).count() > lines
    })
    .await;
    assert_eq!(health().await, (200, 200));
    install_crds(&world.client).await;
    world.allow(world.selector_of_namespace(), everything()).await;
    world.instance().await;
    world.simple("again", json!({"tokenType": "JWT"})).await;
    let issued = |u: &zitadel_tokens::api::ZitadelServiceUser| {
        crate::support::world::condition(u, "Ready").is_some_and(|(_, reason, _)| reason == "Issued")
    };
    crate::support::world::until(world.users(), "again", EVENTUALLY, issued).await;
    let log = operator.log();
    assert!(log.iter().all(|l| !l.contains("panic")), "{log:?}");
}

/// Stops a control plane process with SIGSTOP until this value is dropped.
struct Stopped(String);

impl Stopped {
    fn new(cluster: &Cluster, part: &str) -> Self {
        let stopped = Self(cluster.ready["pids"][part].to_string());
        stopped.signal("STOP");
        stopped
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.0]).status();
        assert!(sent.expect("kill runs").success());
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.signal("CONT");
    }
}

/// A second API server of the cluster that a test can kill: the same command on another port.
struct Server {
    command: Command,
    running: Option<Child>,
    url: String,
}

impl Server {
    fn new(cluster: &Cluster) -> Self {
        let pid = &cluster.ready["pids"]["kube-apiserver"];
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("it runs");
        let port = TcpListener::bind("127.0.0.1:0")
            .expect("a port")
            .local_addr()
            .expect("an address")
            .port();
        let flags: Vec<&str> = line.split('\0').filter(|flag| !flag.is_empty()).collect();
        // If a flag is given twice, the last one counts. The second server needs its own audit log, because two writers
        // would corrupt a shared one.
        let audit = format!("{}/audit-{port}.log", cluster.ready["dir"].as_str().expect("a folder"));
        let own = [format!("--secure-port={port}"), format!("--audit-log-path={audit}")];
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .args(&flags)
            .args(own)
            .current_dir(format!("/proc/{pid}/cwd"))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self {
            command,
            running: None,
            url: format!("https://127.0.0.1:{port}"),
        }
    }

    fn start(&mut self) {
        self.running = Some(self.command.spawn().expect("it starts"));
    }

    fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.kill().expect("killed");
            running.wait().expect("exit status");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
