//! One HTTP GET of a probe or hook: no redirects to elsewhere, no certificate checks (as upstream), bounded body.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{HTTPGetAction, Pod};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;

use crate::pod;

/// Upstream reads so much of a probe's answer.
const MAX_BODY: usize = 10 * 1024;

/// What came back.
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) body: String,
}

/// The port of a container by number or name.
pub(crate) fn port(pod: &Pod, container: &str, port: &IntOrString) -> Option<u16> {
    let number = match port {
        IntOrString::Int(number) => Some(*number),
        IntOrString::String(name) => match name.parse::<i32>() {
            Ok(number) => Some(number),
            Err(_) => pod::find_container(pod, container)?
                .0
                .ports
                .iter()
                .flatten()
                .find(|p| p.name.as_deref() == Some(name))
                .map(|p| p.container_port),
        },
    };
    number.and_then(|n| u16::try_from(n).ok()).filter(|n| *n > 0)
}

/// Where a GET goes.
pub(crate) struct Target {
    pub(crate) https: bool,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Target {
    /// From the action; `None` if its port has no such name.
    pub(crate) fn of(pod: &Pod, container: &str, action: &HTTPGetAction, pod_ip: &str) -> Option<Self> {
        let path = action.path.clone().unwrap_or_default();
        Some(Self {
            https: action.scheme.as_deref().is_some_and(|s| s.eq_ignore_ascii_case("https")),
            host: action.host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| pod_ip.to_owned()),
            port: port(pod, container, &action.port)?,
            path: if path.starts_with('/') { path } else { format!("/{path}") },
            headers: action
                .http_headers
                .iter()
                .flatten()
                .map(|h| (h.name.clone(), h.value.clone()))
                .collect(),
        })
    }

    /// As Go prints the URL.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        format!("{scheme}://{}{}", authority(&self.host, self.port), self.path)
    }
}

/// `host:port`, an IPv6 address in brackets.
pub(crate) fn authority(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Does the GET within `timeout`; an error is worded as Go's client words it.
pub(crate) async fn get(target: &Target, timeout: Duration) -> Result<Answer, String> {
    let url = target.url();
    match tokio::time::timeout(timeout, attempt(target)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(format!("Get \"{url}\": {error}")),
        Err(_) => Err(format!(
            "Get \"{url}\": context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        )),
    }
}

/// Connects, with an error as Go words it.
pub(crate) async fn dial(host: &str, port: u16) -> Result<TcpStream, String> {
    TcpStream::connect((host, port)).await.map_err(|error| {
        let kind = error.kind();
        let what = if kind == std::io::ErrorKind::ConnectionRefused {
            "connect: connection refused".to_owned()
        } else if kind == std::io::ErrorKind::HostUnreachable {
            "connect: no route to host".to_owned()
        } else if kind == std::io::ErrorKind::NetworkUnreachable {
            "connect: network is unreachable".to_owned()
        } else {
            error.to_string()
        };
        format!("dial tcp {}: {what}", authority(host, port))
    })
}

async fn attempt(target: &Target) -> Result<Answer, String> {
    let stream = dial(&target.host, target.port).await?;
    if !target.https {
        return exchange(TokioIo::new(stream), target).await;
    }
    let name = ServerName::try_from(target.host.clone()).map_err(|error| error.to_string())?;
    let tls = tokio_rustls::TlsConnector::from(unchecked_tls()?);
    let stream = tls.connect(name, stream).await.map_err(|error| error.to_string())?;
    exchange(TokioIo::new(stream), target).await
}

async fn exchange<S>(stream: S, target: &Target) -> Result<Answer, String>
where
    S: hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(stream).await.map_err(|error| error.to_string())?;
    let mut request = http::Request::builder().method("GET").uri(&target.path);
    let has = |name: &str| target.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name));
    if !has("host") {
        request = request.header("Host", authority(&target.host, target.port));
    }
    if !has("user-agent") {
        request = request.header("User-Agent", "kube-probe/1.36");
    }
    if !has("accept") {
        request = request.header("Accept", "*/*");
    }
    for (name, value) in &target.headers {
        request = request.header(name, value);
    }
    let request =
        request.header("Connection", "close").body(Empty::<Bytes>::new()).map_err(|e| e.to_string())?;
    let talk = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let code = response.status().as_u16();
        // A longer body is no failure of the probe: what was read so far is not needed whole.
        let body = match Limited::new(response.into_body(), MAX_BODY).collect().await {
            Ok(body) => String::from_utf8_lossy(&body.to_bytes()).into_owned(),
            Err(_) => String::new(),
        };
        Ok(Answer { code, body })
    };
    // The connection lives exactly as long as the exchange: nothing is left behind when the timeout drops it.
    let mut connection = std::pin::pin!(connection);
    let mut talk = std::pin::pin!(talk);
    tokio::select! {
        biased;
        answer = &mut talk => answer,
        ended = &mut connection => match ended {
            Ok(()) => talk.await,
            Err(error) => Err(error.to_string()),
        },
    }
}

fn unchecked_tls() -> Result<Arc<rustls::ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Unchecked(provider.clone()));
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Takes any certificate: a probe asks whether a server answers, not who it is (upstream does the same).
#[derive(Debug)]
struct Unchecked(Arc<rustls::crypto::CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Unchecked {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
