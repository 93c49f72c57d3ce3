//! Owns how requests come in: HTTP/1.1 and HTTP/2 over TLS, and the transport within the process.

pub(crate) mod tls;
mod unread;

use crate::api::Api;
use crate::authn::{Peer, user_of_certificate};
use crate::body::{BoxError, Response};
use crate::identity::User;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Marks a response whose request is still being read: it was passed on to a backend that answered before its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StillReading;

/// How long a client may take over the TLS handshake and over a request's headers.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often an idle HTTP/2 connection is probed.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// Streams that one HTTP/2 connection may have at once, as upstream.
const MAX_STREAMS: u32 = 250;
/// Pause after the listener failed (out of file descriptors), so that it doesn't spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// After so many failures in a row the listener is given up: ten seconds' worth.
const MAX_ACCEPT_FAILURES: u32 = 100;
/// How long requests in progress may take after shutdown began.
const DRAIN: Duration = Duration::from_secs(5);

/// Serves a listener until `shutdown`, then lets requests in progress end. Fails when the listener does.
pub(crate) async fn serve(
    api: Arc<Api>,
    acceptor: TlsAcceptor,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    let connections = TaskTracker::new();
    let mut failures = 0;
    let mut outcome = Ok(());
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                failures = 0;
                connections.spawn(connection(api.clone(), acceptor.clone(), stream, shutdown.clone()));
            }
            Err(error) if failures >= MAX_ACCEPT_FAILURES => {
                outcome = Err(error);
                break;
            }
            Err(error) => {
                failures += 1;
                tracing::warn!(error = %error, "a connection couldn't be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    api.closing.cancel();
    connections.close();
    if tokio::time::timeout(DRAIN, connections.wait()).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections were cut at shutdown");
    }
    outcome
}

async fn connection(api: Arc<Api>, acceptor: TlsAcceptor, stream: TcpStream, shutdown: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(error = %error, "TCP_NODELAY couldn't be set");
    }
    let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(error = %error, "TLS handshake failed");
            return;
        }
        Err(_elapsed) => return,
    };
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let peer = Peer { user: certificate.and_then(|der| user_of_certificate(der)) };
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        let api = api.clone();
        request.extensions_mut().insert(peer.clone());
        let (head, body) = request.into_parts();
        let (unread, loan) = unread::lend(body);
        let request = hyper::Request::from_parts(head, loan.boxed_unsync());
        async move {
            let response = api.handle(request).await;
            if response.extensions().get::<StillReading>().is_none() {
                unread.drain().await;
            }
            Ok::<Response, Infallible>(response)
        }
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .max_concurrent_streams(MAX_STREAMS);
    let served = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(served);
    tokio::select! {
        outcome = served.as_mut() => log_end(outcome),
        () = shutdown.cancelled() => {
            served.as_mut().graceful_shutdown();
            if let Ok(outcome) = tokio::time::timeout(DRAIN, served).await {
                log_end(outcome);
            }
        }
    }
}

fn log_end(outcome: Result<(), BoxError>) {
    if let Err(error) = outcome {
        tracing::debug!(error = %error, "a connection ended");
    }
}

/// The transport within the process: the same handlers, the identity given, no socket and no TLS.
#[derive(Clone)]
pub(crate) struct InProcess {
    api: Arc<Api>,
    peer: Peer,
}

impl InProcess {
    /// A transport whose requests come from `user`.
    pub(crate) fn new(api: Arc<Api>, user: User) -> Self {
        Self { api, peer: Peer { user: Some(user) } }
    }
}

impl tower::Service<http::Request<kube::client::Body>> for InProcess {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<kube::client::Body>) -> Self::Future {
        request.extensions_mut().insert(self.peer.clone());
        let request = request.map(|body| body.map_err(|error| -> BoxError { error.into() }).boxed_unsync());
        let api = self.api.clone();
        let answer = api.handle(request);
        Box::pin(async move { Ok(answer.await) })
    }
}
