//! Owns JSON web tokens signed by ES256 (RFC 7515, 7518 §3.4).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use serde_json::{Value, json};

/// Why keys can't be used, or a token can't be made.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The PEM holds no such key.
    #[error("the service-account {0} is not PEM of an EC P-256 key")]
    Pem(&'static str),
    /// The random source failed, so nothing was signed.
    #[error("a token couldn't be signed")]
    Sign,
}

struct VerificationKey {
    id: String,
    point: Vec<u8>,
}

/// The keys of service-account tokens.
pub(crate) struct TokenKeys {
    pair: EcdsaKeyPair,
    random: SystemRandom,
    keys: Vec<VerificationKey>,
}

/// `SubjectPublicKeyInfo` of a P-256 key up to its point (RFC 5480 §2).
const SPKI_P256: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// An uncompressed point of P-256.
const POINT_BYTES: usize = 65;

impl TokenKeys {
    /// Reads a PKCS#8 signing key and further public keys, all PEM.
    pub(crate) fn new(signing_pem: &str, verification_pems: &[String]) -> Result<Self, KeyError> {
        let random = SystemRandom::new();
        let der = PrivatePkcs8KeyDer::from_pem_slice(signing_pem.as_bytes())
            .map_err(|_ignored| KeyError::Pem("signing key"))?;
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, der.secret_pkcs8_der(), &random)
                .map_err(|_ignored| KeyError::Pem("signing key"))?;
        let mut keys = vec![VerificationKey::of_point(pair.public_key().as_ref().to_vec())];
        for pem in verification_pems {
            let der = SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes())
                .map_err(|_ignored| KeyError::Pem("verification key"))?;
            let point = der
                .as_ref()
                .strip_prefix(&SPKI_P256)
                .filter(|point| point.len() == POINT_BYTES)
                .ok_or(KeyError::Pem("verification key"))?;
            keys.push(VerificationKey::of_point(point.to_vec()));
        }
        Ok(Self { pair, random, keys })
    }

    /// Signs claims.
    pub(crate) fn sign(&self, claims: &Value) -> Result<String, KeyError> {
        let header = json!({"alg": "ES256", "kid": self.keys[0].id});
        let mut token = BASE64.encode(header.to_string());
        token.push('.');
        token.push_str(&BASE64.encode(claims.to_string()));
        let signature = self.pair.sign(&self.random, token.as_bytes()).map_err(|_ignored| KeyError::Sign)?;
        token.push('.');
        token.push_str(&BASE64.encode(signature.as_ref()));
        Ok(token)
    }

    /// The claims of a token that one of the keys has signed.
    pub(crate) fn verify(&self, token: &str) -> Option<Value> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, payload) = signed.split_once('.')?;
        let header: Value = serde_json::from_slice(&BASE64.decode(header).ok()?).ok()?;
        if header["alg"] != "ES256" {
            return None;
        }
        let kid = header["kid"].as_str();
        let signature = BASE64.decode(signature).ok()?;
        let good = self.keys.iter().filter(|key| kid.is_none_or(|kid| kid == key.id)).any(|key| {
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, &key.point)
                .verify(signed.as_bytes(), &signature)
                .is_ok()
        });
        if !good {
            return None;
        }
        serde_json::from_slice(&BASE64.decode(payload).ok()?).ok()
    }

    /// The public keys as a JSON Web Key Set (RFC 7517).
    pub(crate) fn jwks(&self) -> Value {
        let keys: Vec<Value> = self
            .keys
            .iter()
            .map(|key| {
                json!({"use": "sig", "kty": "EC", "kid": key.id, "crv": "P-256", "alg": "ES256",
                    "x": BASE64.encode(&key.point[1..33]), "y": BASE64.encode(&key.point[33..])})
            })
            .collect();
        json!({ "keys": keys })
    }
}

impl VerificationKey {
    fn of_point(point: Vec<u8>) -> Self {
        let mut spki = SPKI_P256.to_vec();
        spki.extend_from_slice(&point);
        let id = BASE64.encode(ring::digest::digest(&ring::digest::SHA256, &spki));
        Self { id, point }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem() -> String {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let body = base64::engine::general_purpose::STANDARD.encode(pkcs8);
        format!("-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n")
    }

    #[test]
    fn own_tokens_only() {
        let keys = TokenKeys::new(&pem(), &[]).unwrap();
        let others = TokenKeys::new(&pem(), &[]).unwrap();
        let token = keys.sign(&json!({"sub": "a"})).unwrap();
        assert_eq!(keys.verify(&token), Some(json!({"sub": "a"})));
        assert_eq!(others.verify(&token), None);
        let (head, signature) = token.rsplit_once('.').unwrap();
        let (header, _) = head.split_once('.').unwrap();
        let forged = format!("{header}.{}.{signature}", BASE64.encode(r#"{"sub":"b"}"#));
        assert_eq!(keys.verify(&forged), None);
        let none = format!("{}.{}.", BASE64.encode(r#"{"alg":"none"}"#), BASE64.encode("{}"));
        assert_eq!(keys.verify(&none), None);
        assert_eq!(keys.verify("x"), None);
    }
}
