//! Owns the way to pods and Services for `proxy`: HTTP/1.1, over TLS where the client asks for it, one connection per request.

use crate::body::{Request, Response};
use crate::config::ConfigError;
use crate::kubelet::{self, CONNECT_TIMEOUT, ProxyError};
use crate::transport::tls;
use hyper::upgrade::OnUpgrade;
use rustls_pki_types::ServerName;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backend {
    /// Address and port.
    pub(crate) address: SocketAddr,
    /// Whether it speaks TLS.
    pub(crate) is_tls: bool,
}

/// The way to pods and Services.
pub(crate) struct BackendProxy {
    connector: TlsConnector,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

impl BackendProxy {
    /// A way that ends with `shutdown`.
    pub(crate) fn new(tasks: TaskTracker, shutdown: CancellationToken) -> Result<Self, ConfigError> {
        let connector = TlsConnector::from(Arc::new(tls::unverified_client_config()?));
        Ok(Self { connector, tasks, shutdown })
    }

    /// Sends a request; answers the response's head, with its body to come.
    pub(crate) async fn send(
        &self,
        to: Backend,
        request: Request,
    ) -> Result<http::Response<hyper::body::Incoming>, ProxyError> {
        let (host, port) = (to.address.ip().to_string(), to.address.port());
        let connect = async {
            let stream = TcpStream::connect(to.address).await?;
            stream.set_nodelay(true)?;
            Ok::<_, std::io::Error>(stream)
        };
        let failed = |source| ProxyError::Connect { host: host.clone(), port, source };
        let timeout = || ProxyError::Timeout { host: host.clone(), port };
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect).await;
        let stream = stream.map_err(|_elapsed| timeout())?.map_err(failed)?;
        if !to.is_tls {
            return kubelet::exchange(stream, request, &self.tasks, self.shutdown.clone()).await;
        }
        let name = ServerName::IpAddress(to.address.ip().into());
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, self.connector.connect(name, stream)).await;
        let stream = stream.map_err(|_elapsed| timeout())?.map_err(failed)?;
        kubelet::exchange(stream, request, &self.tasks, self.shutdown.clone()).await
    }

    /// Joins a client with a backend that has agreed to switch protocols.
    pub(crate) fn join(
        &self,
        client: OnUpgrade,
        mut response: http::Response<hyper::body::Incoming>,
    ) -> Response {
        let backend = hyper::upgrade::on(&mut response);
        kubelet::spawn_join(&self.tasks, self.shutdown.clone(), client, backend);
        let (head, _) = response.into_parts();
        Response::from_parts(head, crate::body::empty())
    }
}
