//! Owns the TLS configurations: of the server, and of its clients for kubelets and backends.

use crate::config::{CertifiedKeyPem, ConfigError, KubeletClient};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::WebPkiClientVerifier;
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::sync::Arc;

fn pem_error(what: &'static str, reason: impl std::fmt::Display) -> ConfigError {
    ConfigError::Pem { what, reason: reason.to_string() }
}

fn certificates(pem: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let chain = chain.map_err(|error| pem_error(what, error))?;
    if chain.is_empty() { Err(pem_error(what, "it holds no certificate")) } else { Ok(chain) }
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(pem: &CertifiedKeyPem, what: &'static str) -> Result<Identity, ConfigError> {
    let key = PrivateKeyDer::from_pem_slice(pem.key.as_bytes()).map_err(|error| pem_error(what, error))?;
    Ok((certificates(&pem.certificates, what)?, key))
}

fn roots(pem: &str, what: &'static str) -> Result<RootCertStore, ConfigError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(pem, what)? {
        store.add(certificate).map_err(|source| ConfigError::Tls { what, source })?;
    }
    Ok(store)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// TLS of the server: client certificates are asked for, and checked if given.
pub(crate) fn server_config(
    serving: &CertifiedKeyPem,
    client_ca: &str,
) -> Result<rustls::ServerConfig, ConfigError> {
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots(client_ca, "client CA")?), provider())
            .allow_unauthenticated()
            .build()
            .map_err(|error| pem_error("client CA", error))?;
    let (chain, key) = identity(serving, "serving certificate")?;
    let tls = |source| ConfigError::Tls { what: "serving", source };
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(tls)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// TLS towards pods and Services: their certificates are nobody's that this server knows, so none is checked, as upstream.
pub(crate) fn unverified_client_config() -> Result<rustls::ClientConfig, ConfigError> {
    let tls = |source| ConfigError::Tls { what: "backend client", source };
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(tls)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Unverified(provider())))
        .with_no_client_auth();
    Ok(config)
}

/// Takes any certificate, but still wants the handshake signed with its key.
#[derive(Debug)]
struct Unverified(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// TLS towards kubelets. HTTP/1.1 alone: upgrades need it.
pub(crate) fn client_config(client: &KubeletClient) -> Result<rustls::ClientConfig, ConfigError> {
    let (chain, key) = identity(&client.identity, "kubelet client certificate")?;
    let tls = |source| ConfigError::Tls { what: "kubelet client", source };
    rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(tls)?
        .with_root_certificates(roots(&client.ca, "kubelet CA")?)
        .with_client_auth_cert(chain, key)
        .map_err(tls)
}
