//! Owns the way to kubelets: HTTPS with the server's client certificate, one connection per request.
//!
//! Logs are passed on as they come. An upgrade (exec, attach, port forwarding) is passed on too: when the kubelet
//! agrees, bytes are copied between the two connections until one of them ends.

use crate::body::{BoxError, Request, Response};
use crate::config::{ConfigError, KubeletClient};
use crate::transport::tls;
use http::StatusCode;
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use weft_control_api::status::Status;

/// How long a kubelet or a backend may take to accept a connection.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// As much of a kubelet's error as is passed on.
const MAX_ERROR_BYTES: usize = 64 * 1024;

/// Where a kubelet listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// Address or host name.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
}

/// The way to kubelets.
pub(crate) struct KubeletProxy {
    connector: TlsConnector,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

/// Why a kubelet couldn't be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProxyError {
    /// The host is neither an address nor a name.
    #[error("{0:?} is no host")]
    Host(String),
    /// No connection.
    #[error("dial tcp {host}:{port}")]
    Connect {
        /// Address.
        host: String,
        /// Port.
        port: u16,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No connection in time.
    #[error("dial tcp {host}:{port}: i/o timeout")]
    Timeout {
        /// Address.
        host: String,
        /// Port.
        port: u16,
    },
    /// The other side broke the protocol or went away.
    #[error("the request failed")]
    Http(#[source] hyper::Error),
}

impl KubeletProxy {
    /// A way to kubelets whose certificates the configured authorities have signed.
    pub(crate) fn new(
        client: &KubeletClient,
        tasks: TaskTracker,
        shutdown: CancellationToken,
    ) -> Result<Self, ConfigError> {
        let config = tls::client_config(client)?;
        Ok(Self { connector: TlsConnector::from(Arc::new(config)), tasks, shutdown })
    }

    /// Asks a kubelet; answers whatever it answers, errors too.
    pub(crate) async fn send(
        &self,
        to: &Endpoint,
        request: Request,
    ) -> Result<http::Response<hyper::body::Incoming>, ProxyError> {
        let Endpoint { host, port } = to.clone();
        let name = ServerName::try_from(host.clone()).map_err(|_invalid| ProxyError::Host(host.clone()))?;
        let connect = async {
            let stream = TcpStream::connect((host.as_str(), port)).await?;
            stream.set_nodelay(true)?;
            self.connector.connect(name, stream).await
        };
        let stream = match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(source)) => return Err(ProxyError::Connect { host, port, source }),
            Err(_elapsed) => return Err(ProxyError::Timeout { host, port }),
        };
        exchange(stream, request, &self.tasks, self.shutdown.clone()).await
    }

    /// Asks a kubelet and passes its answer on; its errors become the API's.
    pub(crate) async fn fetch(&self, to: &Endpoint, request: Request) -> Result<Response, Status> {
        let response = self.send(to, request).await.map_err(|error| unreachable(&error))?;
        if response.status().is_success() {
            return Ok(response.map(|body| body.map_err(BoxError::from).boxed_unsync()));
        }
        Err(refused(response).await)
    }

    /// Asks a kubelet to switch protocols, and joins the two connections if it does.
    pub(crate) async fn upgrade(
        &self,
        to: &Endpoint,
        request: Request,
        client: hyper::upgrade::OnUpgrade,
    ) -> Result<Response, Status> {
        let mut response = self.send(to, request).await.map_err(|error| unreachable(&error))?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refused(response).await);
        }
        let kubelet = hyper::upgrade::on(&mut response);
        spawn_join(&self.tasks, self.shutdown.clone(), client, kubelet);
        let (head, _) = response.into_parts();
        Ok(Response::from_parts(head, crate::body::empty()))
    }
}

/// Sends a request on a new connection. The connection lives until its response is read, or its upgrade ends.
pub(crate) async fn exchange<S>(
    stream: S,
    request: Request,
    tasks: &TaskTracker,
    shutdown: CancellationToken,
) -> Result<http::Response<hyper::body::Incoming>, ProxyError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(ProxyError::Http)?;
    tasks.spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            outcome = connection.with_upgrades() => if let Err(error) = outcome {
                tracing::debug!(error = %crate::cache::Chain(&error), "a connection to a kubelet or backend ended");
            },
        }
    });
    sender.send_request(request).await.map_err(ProxyError::Http)
}

/// Copies bytes between two upgraded connections until one of them ends.
pub(crate) fn spawn_join(
    tasks: &TaskTracker,
    shutdown: CancellationToken,
    client: hyper::upgrade::OnUpgrade,
    backend: hyper::upgrade::OnUpgrade,
) {
    tasks.spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            outcome = join(client, backend) => if let Err(error) = outcome {
                tracing::debug!(error = %error, "an upgraded connection ended");
            },
        }
    });
}

async fn join(client: hyper::upgrade::OnUpgrade, kubelet: hyper::upgrade::OnUpgrade) -> Result<(), BoxError> {
    let (client, kubelet) = tokio::try_join!(client, kubelet)?;
    let (mut client, mut kubelet) = (TokioIo::new(client), TokioIo::new(kubelet));
    tokio::io::copy_bidirectional(&mut client, &mut kubelet).await?;
    Ok(())
}

fn unreachable(error: &ProxyError) -> Status {
    Status::internal(format!("error dialing backend: {}", crate::cache::Chain(error)))
}

async fn refused(response: http::Response<hyper::body::Incoming>) -> Status {
    let code = response.status();
    let body = http_body_util::Limited::new(response.into_body(), MAX_ERROR_BYTES).collect().await;
    let text = body.map(|b| String::from_utf8_lossy(&b.to_bytes()).trim_end().to_owned()).unwrap_or_default();
    match code {
        StatusCode::BAD_REQUEST => Status::bad_request(text),
        StatusCode::INTERNAL_SERVER_ERROR => Status::internal(text),
        StatusCode::NOT_FOUND => Status::failure(404, "NotFound", text),
        StatusCode::FORBIDDEN => Status::failure(403, "Forbidden", text),
        StatusCode::UNAUTHORIZED => Status::internal(format!("the kubelet doesn't know this server: {text}")),
        other => Status::failure(other.as_u16(), "", text),
    }
}
