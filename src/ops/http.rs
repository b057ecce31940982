//! The operator's own HTTP port: `/livez`, `/readyz`, `/metrics`.
//!
//! Clients may be hostile, so connections are bounded in time, memory and number (docs/architecture.md).

mod connections;
mod scrapes;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{ACCEPT, ALLOW, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::ops::exposition::Format;
use connections::Connections;
use scrapes::Scrapes;

/// A check that runs on each request of a probe.
pub type Probe = Arc<dyn Fn() -> bool + Send + Sync>;

/// Limits of connections.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Connections that do not read metrics. This leaves most of 1,024 file descriptors for connections to the API
    /// server and ZITADEL.
    open: usize,
    /// Connections that read metrics.
    scraping: usize,
    /// From accept to the end of the headers.
    headers: Duration,
    /// From accept to close.
    lifetime: Duration,
}

const LIMITS: Limits = Limits {
    open: 112,
    scraping: 16,
    headers: Duration::from_secs(5),
    lifetime: Duration::from_secs(15),
};

/// Longest header block, and the largest buffer for a response. Prometheus sends about 300 bytes of headers.
const HEADERS: usize = 16 * 1024;

/// Kernel buffers of one connection, in each direction. The kernel doubles both values for its bookkeeping (socket(7)).
const RECEIVE_BUFFER: u32 = 16 * 1024;
const SEND_BUFFER: u32 = 128 * 1024;

/// Connections that the kernel completes while the accept loop is busy. Beyond that, clients, including probes, retry
/// after a second.
const BACKLOG: u32 = 4096;

/// How many bytes after the headers the operator reads and drops.
const REST: u64 = 16 * 1024;

/// Pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(1);

/// Minimum time between two log lines about failed accepts.
const SILENCE: Duration = Duration::from_mins(1);

/// Opens the port.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    socket.set_reuseaddr(true)?;
    // Accepted connections inherit both buffer sizes.
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until the task is aborted.
pub async fn serve(listener: TcpListener, live: Probe, ready: Probe, registry: Arc<Registry>) {
    Port::new(live, ready, registry, LIMITS).serve(listener).await;
}

struct Port {
    live: Probe,
    ready: Probe,
    scrapes: Scrapes,
    limits: Limits,
    open: Mutex<Open>,
}

/// Open connections of both kinds. Each kind has its own limit, so that many of one kind close none of the other.
struct Open {
    last_id: u64,
    waiting: Connections<AbortHandle>,
    scraping: Connections<AbortHandle>,
}

impl Open {
    fn close_one(&mut self) -> Option<AbortHandle> {
        self.waiting.close_one().or_else(|| self.scraping.close_one())
    }
}

impl Port {
    fn new(live: Probe, ready: Probe, registry: Arc<Registry>, limits: Limits) -> Arc<Self> {
        let open = Open {
            last_id: 0,
            waiting: Connections::new(limits.open),
            scraping: Connections::new(limits.scraping),
        };
        Arc::new(Self {
            live,
            ready,
            scrapes: Scrapes::new(registry),
            limits,
            open: Mutex::new(open),
        })
    }

    async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut logged: Option<Instant> = None;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => self.admit(stream, peer.ip()),
                // Usually the process has no file descriptors left. Closing a connection frees one for the next accept.
                Err(error) => {
                    if logged.is_none_or(|at| at.elapsed() > SILENCE) {
                        tracing::warn!(%error, "could not accept a connection on the HTTP port");
                        logged = Some(Instant::now());
                    }
                    self.open().close_one().inspect(AbortHandle::abort);
                    sleep(PAUSE).await;
                }
            }
            // Let other tasks run, so that a request that has arrived is answered before newer connections close its
            // connection.
            tokio::task::yield_now().await;
        }
    }

    fn admit(self: &Arc<Self>, stream: TcpStream, peer: IpAddr) {
        // Keep the lock until the task is registered, because the task removes itself when it ends.
        let mut open = self.open();
        open.last_id += 1;
        let id = open.last_id;
        let task = tokio::spawn(self.clone().keep(stream, id)).abort_handle();
        open.waiting.add(id, peer, task).inspect(AbortHandle::abort);
    }

    fn count_as_scrape(&self, id: u64) {
        let mut open = self.open();
        if let Some((peer, task)) = open.waiting.remove(id) {
            open.scraping.add(id, peer, task).inspect(AbortHandle::abort);
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves one request on a connection, then closes it.
    async fn keep(self: Arc<Self>, mut stream: TcpStream, id: u64) {
        // With zero linger, closing drops the data that the client did not read. Otherwise the kernel would keep it for
        // minutes, outside all limits.
        if stream.set_zero_linger().is_ok() {
            // Errors and the timeout affect only this client.
            let _ = timeout(self.limits.lifetime, self.converse(&mut stream, id)).await;
        }
        let mut open = self.open();
        open.waiting.remove(id);
        open.scraping.remove(id);
    }

    async fn converse(&self, stream: &mut TcpStream, id: u64) -> std::io::Result<()> {
        let service =
            service_fn(async |request: Request<Incoming>| Ok::<_, Infallible>(self.answer(&request, id).await));
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .keep_alive(false)
            .half_close(true)
            .max_buf_size(HEADERS)
            .header_read_timeout(self.limits.headers)
            .serve_connection(TokioIo::new(&mut *stream), service)
            .await;
        if served.is_err_and(|error| error.is_timeout()) {
            return Ok(());
        }
        // hyper may have sent a response even after other errors, such as 400 or 431. Wait until the client closes:
        // closing with unread bytes of the client could discard the response (RFC 9112 §9.6).
        stream.shutdown().await?;
        tokio::io::copy(&mut stream.take(REST), &mut tokio::io::sink()).await?;
        Ok(())
    }

    /// Responds from the headers alone. The body of the request is never read.
    async fn answer(&self, request: &Request<Incoming>, id: u64) -> Response<Text> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            let mut answer = line(StatusCode::METHOD_NOT_ALLOWED, "use GET\n");
            answer
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return answer;
        }
        match request.uri().path() {
            "/livez" => health((self.live)()),
            "/readyz" => health((self.ready)()),
            "/metrics" => {
                self.count_as_scrape(id);
                let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
                let format = Format::asked_for_by(accept.unwrap_or_default());
                match self.scrapes.text().await {
                    Some(text) => answer(format.content_type(), Box::new(format.parts(text).map(Bytes::from))),
                    None => line(StatusCode::INTERNAL_SERVER_ERROR, "no metrics\n"),
                }
            }
            _ => line(StatusCode::NOT_FOUND, "not found\n"),
        }
    }
}

fn health(good: bool) -> Response<Text> {
    if good {
        line(StatusCode::OK, "ok\n")
    } else {
        line(StatusCode::SERVICE_UNAVAILABLE, "unavailable\n")
    }
}

fn line(status: StatusCode, line: &'static str) -> Response<Text> {
    let part = std::iter::once(Bytes::from_static(line.as_bytes()));
    let mut answer = answer("text/plain; charset=utf-8", Box::new(part));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_LENGTH, line.len().into());
    answer
}

fn answer(content_type: &'static str, parts: Box<dyn Iterator<Item = Bytes> + Send>) -> Response<Text> {
    let mut answer = Response::new(Text(parts));
    let content_type = HeaderValue::from_static(content_type);
    answer.headers_mut().insert(CONTENT_TYPE, content_type);
    answer
}

/// A body in parts. Each part is built after the client has read the previous ones.
struct Text(Box<dyn Iterator<Item = Bytes> + Send>);

impl Body for Text {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.next().map(|part| Ok(Frame::data(part))))
    }
}
