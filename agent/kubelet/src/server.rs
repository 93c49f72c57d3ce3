//! The kubelet's HTTPS server: logs, exec, pods, health and metrics, for the API server alone (client certificates).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequestParts, WebSocketUpgrade};
use axum::response::{IntoResponse, Response};
use http::{Method, Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::List;
use k8s_openapi::api::core::v1::Pod;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::config::{Config, ServerTls};
use crate::shared::Shared;
use weft_agent_runtime::chain;

mod container_logs;
mod exec;
mod node_logs;

/// Connections at a time; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
const HANDSHAKE: Duration = Duration::from_secs(10);

/// The bound port with its TLS configuration.
pub(crate) struct Listener {
    socket: TcpListener,
    tls: TlsAcceptor,
}

impl Listener {
    pub(crate) async fn bind(config: &Config) -> Result<Self, Error> {
        let tls = TlsAcceptor::from(Arc::new(tls(&config.tls)?));
        let addr = config.listen;
        let socket = TcpListener::bind(addr).await.map_err(|source| Error::Listen { addr, source })?;
        Ok(Self { socket, tls })
    }

    #[cfg(test)]
    pub(crate) fn addr(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }
}

fn tls(material: &ServerTls) -> Result<rustls::ServerConfig, Error> {
    let pem = |what: &str| Error::Config(format!("{what} is no PEM"));
    let certs = |text: &str, what: &str| {
        CertificateDer::pem_slice_iter(text.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|_bad| pem(what))
    };
    let mut roots = rustls::RootCertStore::empty();
    for ca in certs(&material.client_ca_pem, "the client CA")? {
        roots.add(ca)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|error| Error::Config(format!("the client CA can't be used: {error}")))?;
    let key =
        PrivateKeyDer::from_pem_slice(material.key_pem.as_bytes()).map_err(|_bad| pem("the server's key"))?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certs(&material.cert_pem, "the server's certificate")?, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Serves until shutdown.
pub(crate) async fn run(listener: Listener, shared: Arc<Shared>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.socket.accept(), if connections.len() < MAX_CONNECTIONS => match accepted {
                Ok((stream, peer)) => {
                    connections.spawn(connection(stream, peer, listener.tls.clone(), shared.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    // Out of descriptors: give others time to close.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn connection(stream: TcpStream, peer: SocketAddr, tls: TlsAcceptor, shared: Arc<Shared>) {
    // Only costs latency where it fails.
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    let certificate =
        stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(|c| c.as_ref().to_vec());
    let allowed = certificate.as_deref().is_some_and(may_enter);
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let shared = shared.clone();
        async move {
            let response = if allowed {
                route(shared, request.map(Body::new)).await
            } else {
                (StatusCode::FORBIDDEN, "Forbidden").into_response()
            };
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    if let Err(error) = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await {
        tracing::debug!(%peer, error, "connection ended");
    }
}

/// The API server's client certificate, or one of an administrator.
fn may_enter(certificate: &[u8]) -> bool {
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else { return false };
    let subject = parsed.subject();
    let is = |text: Result<&str, _>, wanted: &str| text.is_ok_and(|t| t == wanted);
    let named = subject.iter_common_name().any(|cn| is(cn.as_str(), "kube-apiserver-kubelet-client"));
    named || subject.iter_organization().any(|o| is(o.as_str(), "system:masters"))
}

/// Query parameters, decoded.
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    fn of(request: &Request<Body>) -> Self {
        let text = request.uri().query().unwrap_or_default();
        Self(form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn all(&self, name: &str) -> Vec<String> {
        self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.clone()).collect()
    }

    fn flag(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.get(name).is_some_and(|v| matches!(v, "1" | "true")))
    }
}

async fn route(shared: Arc<Shared>, request: Request<Body>) -> Response {
    let path = request.uri().path().to_owned();
    let query = Query::of(&request);
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    match (request.method(), parts.as_slice()) {
        (&Method::GET, ["healthz"]) => "ok".into_response(),
        (&Method::GET, ["metrics"]) => metrics(&shared),
        (&Method::GET, ["pods"] | ["pods", ""] | ["runningpods"] | ["runningpods", ""]) => pods(&shared),
        (&Method::GET, ["containerLogs", namespace, pod, container]) => {
            container_logs::serve(shared.clone(), (namespace, pod, container), &query).await
        }
        (
            &Method::GET | &Method::POST,
            ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container],
        ) => {
            let target = (*namespace, *pod, *container);
            let id = match find(&shared, target, false) {
                Ok(id) => id,
                Err(response) => return *response,
            };
            let (mut head, _) = request.into_parts();
            match WebSocketUpgrade::from_request_parts(&mut head, &()).await {
                Ok(upgrade) => exec::serve(shared.clone(), id, upgrade, &query),
                Err(rejection) => rejection.into_response(),
            }
        }
        (&Method::GET, ["logs", rest @ ..]) => node_logs::serve(&shared, rest).await,
        _ => (StatusCode::NOT_FOUND, "404 page not found\n").into_response(),
    }
}

fn metrics(shared: &Shared) -> Response {
    count_running(shared);
    match shared.metrics.text() {
        Ok(text) => (
            [(http::header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")],
            text,
        )
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Pods and containers that run, as last reported.
fn count_running(shared: &Shared) {
    let pods = shared.pods.read();
    let statuses = || pods.values().filter_map(|view| view.pod.status.as_ref());
    let containers = statuses()
        .flat_map(|s| s.container_statuses.iter().flatten().chain(s.init_container_statuses.iter().flatten()))
        .filter(|c| c.state.as_ref().is_some_and(|state| state.running.is_some()));
    let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    shared.metrics.running_containers.set(number(containers.count()));
    let running = statuses().filter(|s| s.phase.as_deref() == Some("Running"));
    shared.metrics.running_pods.set(number(running.count()));
}

fn pods(shared: &Shared) -> Response {
    let items = shared.pods.read().values().map(|view| (*view.pod).clone()).collect();
    let list = List::<Pod> { items, ..List::default() };
    match serde_json::to_vec(&list) {
        Ok(body) => ([(http::header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// The id of a container, or with `previous` of the attempt before; else the answer to give.
fn find(
    shared: &Shared,
    (namespace, pod, container): (&str, &str, &str),
    previous: bool,
) -> Result<String, Box<Response>> {
    let no = |code: StatusCode, text: String| Box::new((code, text).into_response());
    let pods = shared.pods.read();
    let Some(view) = pods.get(&(namespace.to_owned(), pod.to_owned())) else {
        return Err(no(StatusCode::NOT_FOUND, format!("pod \"{pod}_{namespace}\" does not exist")));
    };
    if crate::pod::find_container(&view.pod, container).is_none() {
        let text = format!("container {container} not found in pod {pod}_{namespace}");
        return Err(no(StatusCode::NOT_FOUND, text));
    }
    let attempts = view.containers.get(container).map(Vec::as_slice).unwrap_or_default();
    let index = attempts.len().checked_sub(if previous { 2 } else { 1 });
    match index.and_then(|i| attempts.get(i)) {
        Some((_, id)) => Ok(id.clone()),
        None if previous => {
            let text = format!("previous terminated container \"{container}\" in pod \"{pod}\" not found");
            Err(no(StatusCode::BAD_REQUEST, text))
        }
        None => {
            let text = format!(
                "container \"{container}\" in pod \"{pod}\" is waiting to start: {}",
                waiting_reason(&view.pod, container)
            );
            Err(no(StatusCode::BAD_REQUEST, text))
        }
    }
}

fn waiting_reason(pod: &Pod, container: &str) -> String {
    let status = pod.status.as_ref();
    let mut all = status.iter().flat_map(|s| {
        s.container_statuses.iter().flatten().chain(s.init_container_statuses.iter().flatten())
    });
    let reason =
        all.find(|s| s.name == container).and_then(|s| s.state.as_ref()?.waiting.as_ref()?.reason.clone());
    reason.unwrap_or_else(|| "ContainerCreating".to_owned())
}

/// An error of the runtime as an answer.
fn runtime_error(error: &weft_agent_runtime::Error) -> Response {
    let missing = matches!(error, weft_agent_runtime::Error::NotFound { .. });
    let code = if missing { StatusCode::NOT_FOUND } else { StatusCode::INTERNAL_SERVER_ERROR };
    (code, chain(error)).into_response()
}

#[cfg(test)]
mod tests;
