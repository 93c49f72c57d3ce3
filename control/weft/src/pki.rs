//! The cluster's keys and certificates, made at the first start and renewed at a later one.

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

const CA_YEARS: i16 = 10;
const LEAF_YEARS: i16 = 1;
/// A certificate with less than this left is made anew at the next start.
const RENEW_BEFORE_SECONDS: i64 = 60 * 24 * 3600;

/// Why keys or certificates can't be made or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot {op} {path:?}")]
    Io {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot make the certificate of {subject}")]
    Issue {
        subject: String,
        #[source]
        source: rcgen::Error,
    },
    #[error("{path:?} holds no certificate or key that can be used")]
    Unreadable {
        path: PathBuf,
        #[source]
        source: rcgen::Error,
    },
}

/// A certificate with its key, both PEM.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// Whom a certificate names and what it is good for.
#[derive(Clone, Debug)]
pub(crate) struct Subject<'a> {
    /// Common name: the user.
    pub(crate) name: &'a str,
    /// Organizations: the user's groups.
    pub(crate) groups: &'a [&'a str],
    /// Names and addresses a server answers at; empty for a client.
    pub(crate) dns: Vec<String>,
    pub(crate) addresses: Vec<IpAddr>,
}

impl<'a> Subject<'a> {
    pub(crate) fn client(name: &'a str, groups: &'a [&'a str]) -> Self {
        Self { name, groups, dns: Vec::new(), addresses: Vec::new() }
    }

    fn is_server(&self) -> bool {
        !self.dns.is_empty() || !self.addresses.is_empty()
    }
}

/// The cluster's certificate authority.
pub(crate) struct Authority {
    folder: PathBuf,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Reads the authority from `folder`, or makes it.
    pub(crate) fn open(folder: &Path) -> Result<Self, Error> {
        let (certificate_path, key_path) = (folder.join("ca.crt"), folder.join("ca.key"));
        if !certificate_path.exists() {
            let identity = make_authority()?;
            // The key first: a certificate on disk means that its key is there too.
            write_private(&key_path, &identity.key)?;
            write_public(&certificate_path, &identity.certificate)?;
        }
        let certificate = read(&certificate_path)?;
        let key = KeyPair::from_pem(&read(&key_path)?)
            .map_err(|source| Error::Unreadable { path: key_path, source })?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key)
            .map_err(|source| Error::Unreadable { path: certificate_path, source })?;
        Ok(Self { folder: folder.to_path_buf(), certificate, issuer })
    }

    /// The authority's certificate, PEM.
    pub(crate) fn certificate(&self) -> &str {
        &self.certificate
    }

    /// The identity kept as `<name>.crt` and `<name>.key` in the authority's folder; made where it is missing, near its
    /// end, or doesn't cover the subject's names any more.
    pub(crate) fn identity(&self, file: &str, subject: &Subject<'_>) -> Result<Identity, Error> {
        self.identity_in(&self.folder.clone(), file, subject)
    }

    /// As [`Self::identity`], kept in another folder.
    pub(crate) fn identity_in(
        &self,
        folder: &Path,
        file: &str,
        subject: &Subject<'_>,
    ) -> Result<Identity, Error> {
        let certificate_path = folder.join(format!("{file}.crt"));
        let key_path = folder.join(format!("{file}.key"));
        if let (Ok(certificate), Ok(key)) = (read(&certificate_path), read(&key_path))
            && still_good(&certificate, subject)
        {
            return Ok(Identity { certificate, key });
        }
        let identity = self.issue(subject)?;
        write_private(&key_path, &identity.key)?;
        write_public(&certificate_path, &identity.certificate)?;
        Ok(identity)
    }

    fn issue(&self, subject: &Subject<'_>) -> Result<Identity, Error> {
        let failed = |source| Error::Issue { subject: subject.name.to_owned(), source };
        let mut params = CertificateParams::new(subject.dns.clone()).map_err(failed)?;
        params.subject_alt_names.extend(subject.addresses.iter().copied().map(SanType::IpAddress));
        params.distinguished_name.push(DnType::CommonName, subject.name);
        for group in subject.groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = if subject.is_server() {
            vec![ExtendedKeyUsagePurpose::ServerAuth]
        } else {
            vec![ExtendedKeyUsagePurpose::ClientAuth]
        };
        set_validity(&mut params, LEAF_YEARS);
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// The key that signs service-account tokens, PKCS#8 PEM (P-256).
pub(crate) fn service_account_key(folder: &Path) -> Result<String, Error> {
    let path = folder.join("sa.key");
    if !path.exists() {
        let key = KeyPair::generate()
            .map_err(|source| Error::Issue { subject: "service accounts".to_owned(), source })?;
        write_private(&path, &key.serialize_pem())?;
        write_public(&folder.join("sa.pub"), &key.public_key_pem())?;
    }
    read(&path)
}

fn make_authority() -> Result<Identity, Error> {
    let failed = |source| Error::Issue { subject: "the cluster's authority".to_owned(), source };
    let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
    params.distinguished_name.push(DnType::CommonName, "kubernetes");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    set_validity(&mut params, CA_YEARS);
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok(Identity { certificate: certificate.pem(), key: key.serialize_pem() })
}

/// Sets the bounds: from yesterday (clocks differ) for a number of years.
fn set_validity(params: &mut CertificateParams, years: i16) {
    let yesterday = jiff::Zoned::now().with_time_zone(jiff::tz::TimeZone::UTC).date().yesterday();
    let start = yesterday.unwrap_or(jiff::civil::Date::constant(2026, 1, 1));
    let date = |years: i16| {
        // The 29th of February isn't in every year.
        let (month, day) = (start.month().unsigned_abs(), start.day().unsigned_abs().min(28));
        date_time_ymd(i32::from(start.year() + years), month, day)
    };
    params.not_before = date(0);
    params.not_after = date(years);
}

fn still_good(pem: &str, subject: &Subject<'_>) -> bool {
    let Ok((_, pem)) = x509_parser::pem::parse_x509_pem(pem.as_bytes()) else { return false };
    let Ok((_, certificate)) = X509Certificate::from_der(&pem.contents) else { return false };
    let left = certificate.validity().not_after.timestamp() - jiff::Timestamp::now().as_second();
    if left < RENEW_BEFORE_SECONDS {
        return false;
    }
    let names = match certificate.subject_alternative_name() {
        Ok(Some(extension)) => extension.value.general_names.as_slice(),
        Ok(None) => &[],
        Err(_) => return false,
    };
    let has_dns =
        |wanted: &String| names.iter().any(|name| matches!(name, GeneralName::DNSName(n) if n == wanted));
    let has_address = |wanted: &IpAddr| {
        let octets = match wanted {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        };
        names.iter().any(|name| matches!(name, GeneralName::IPAddress(bytes) if *bytes == octets))
    };
    subject.dns.iter().all(has_dns) && subject.addresses.iter().all(has_address)
}

fn read(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Io { op: "read", path: path.to_path_buf(), source })
}

fn write_public(path: &Path, content: &str) -> Result<(), Error> {
    write(path, content, 0o644)
}

fn write_private(path: &Path, content: &str) -> Result<(), Error> {
    write(path, content, 0o600)
}

/// Writes a file whole or not at all.
pub(crate) fn write(path: &Path, content: &str, mode: u32) -> Result<(), Error> {
    let failed = |source| Error::Io { op: "write", path: path.to_path_buf(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    let fresh = path.with_extension("new");
    let _ = fs::remove_file(&fresh);
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&fresh).map_err(failed)?;
    file.write_all(content.as_bytes()).and_then(|()| file.sync_data()).map_err(failed)?;
    fs::rename(&fresh, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(addresses: &[&str]) -> Subject<'static> {
        Subject {
            name: "kube-apiserver",
            groups: &[],
            dns: vec!["kubernetes".to_owned()],
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn what_is_good_is_kept_and_a_new_address_makes_a_new_certificate() {
        let folder = std::env::temp_dir().join(format!("weft-pki-{}", std::process::id()));
        let first = Authority::open(&folder).unwrap();
        let made = first.identity("apiserver", &server(&["10.43.0.1"])).unwrap();
        let again = Authority::open(&folder).unwrap();
        assert_eq!(again.certificate(), first.certificate());
        assert_eq!(
            again.identity("apiserver", &server(&["10.43.0.1"])).unwrap().certificate,
            made.certificate
        );
        let wider = again.identity("apiserver", &server(&["10.43.0.1", "192.0.2.7"])).unwrap();
        assert_ne!(wider.certificate, made.certificate);
        fs::remove_dir_all(folder).unwrap();
    }
}
