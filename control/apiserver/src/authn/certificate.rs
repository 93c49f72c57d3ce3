//! Owns how a client certificate names a user: the common name, and the organizations as groups.

use crate::identity::User;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The user of a certificate that TLS has verified; none if it has no common name.
pub(crate) fn user_of_certificate(der: &[u8]) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?;
    let groups: Vec<&str> = subject.iter_organization().filter_map(|o| o.as_str().ok()).collect();
    (!name.is_empty()).then(|| User::new(name, &groups))
}
