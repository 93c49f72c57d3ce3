//! Owns authentication: client certificates, service-account tokens, anonymous callers, impersonation.

mod certificate;
pub(crate) mod jwt;
mod token;

pub(crate) use certificate::user_of_certificate;
pub use jwt::KeyError;
pub(crate) use jwt::TokenKeys;
pub(crate) use token::{BoundObject, Claims, TokenError, Tokens};

use crate::identity::User;
use http::HeaderMap;

/// What a connection showed about its peer; put into the extensions of its requests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peer {
    /// The user of the client certificate, or of the in-process transport.
    pub(crate) user: Option<User>,
}

/// Why a request has no user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuthnError {
    /// A bearer token that isn't good.
    #[error("the bearer token is not valid")]
    Token(#[source] TokenError),
}

/// Finds out who sent a request. Who shows no credentials is `system:anonymous`, and may do what RBAC gives to
/// strangers; who shows bad ones is nobody.
pub(crate) fn authenticate(
    tokens: &Tokens,
    peer: Option<&Peer>,
    headers: &HeaderMap,
) -> Result<User, AuthnError> {
    if let Some(user) = peer.and_then(|p| p.user.as_ref()) {
        return Ok(user.clone());
    }
    if let Some(token) = bearer_token(headers) {
        return tokens.authenticate(token, None).map(|(user, _)| user).map_err(AuthnError::Token);
    }
    Ok(User::anonymous())
}

fn bearer_token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(http::header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    (scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty()).then(|| token.trim())
}

/// Whom a request wants to act as, by its `Impersonate-*` headers.
pub(crate) struct Impersonation {
    /// The user to act as.
    pub(crate) user: User,
    /// Groups that the caller named (they are authorized one by one).
    pub(crate) groups: Vec<String>,
}

/// Reads the impersonation headers; `Err` says what is wrong with them.
pub(crate) fn impersonation(headers: &HeaderMap) -> Result<Option<Impersonation>, &'static str> {
    let text = |name: &str| headers.get(name).and_then(|v| v.to_str().ok());
    let groups: Vec<String> = headers
        .get_all("impersonate-group")
        .iter()
        .filter_map(|v| v.to_str().ok().map(str::to_owned))
        .collect();
    let mut extra = std::collections::BTreeMap::<String, Vec<String>>::new();
    for (name, value) in headers {
        if let (Some(key), Ok(value)) = (name.as_str().strip_prefix("impersonate-extra-"), value.to_str()) {
            extra.entry(key.to_owned()).or_default().push(value.to_owned());
        }
    }
    let Some(name) = text("impersonate-user") else {
        if groups.is_empty() && extra.is_empty() && text("impersonate-uid").is_none() {
            return Ok(None);
        }
        return Err("requested impersonation without a user");
    };
    let named: Vec<&str> = groups.iter().map(String::as_str).collect();
    let mut user = User::new(name, &named);
    if let (Some((namespace, account)), true) = (user.as_service_account(), groups.is_empty()) {
        user = User::service_account(namespace, account, "");
    }
    if name == crate::identity::ANONYMOUS {
        user.groups = vec![crate::identity::UNAUTHENTICATED.to_owned()];
    }
    text("impersonate-uid").unwrap_or_default().clone_into(&mut user.uid);
    user.extra = extra;
    Ok(Some(Impersonation { user, groups }))
}
