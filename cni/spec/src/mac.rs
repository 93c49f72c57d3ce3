//! A hardware address as the specification writes it.

use serde::Deserialize;

/// A hardware address of Ethernet that a device may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct HardwareAddress(pub [u8; 6]);

/// A text that is no such address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no hardware address of a device")]
pub struct NotAnAddress(String);

impl std::str::FromStr for HardwareAddress {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || NotAnAddress(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_no_number| wrong())?;
        }
        // The lowest bit of the first byte is a group's.
        if parts.next().is_some() || bytes == [0; 6] || bytes[0] & 1 == 1 {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for HardwareAddress {
    type Error = NotAnAddress;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses_that_a_device_may_have() {
        assert_eq!("c2:b0:57:49:47:f1".parse(), Ok(HardwareAddress([0xc2, 0xb0, 0x57, 0x49, 0x47, 0xf1])));
        for wrong in
            ["", "c2:b0:57:49:47", "c2:b0:57:49:47:f1:00", "01:00:5e:00:00:01", "00:00:00:00:00:00", "x"]
        {
            assert!(wrong.parse::<HardwareAddress>().is_err(), "{wrong}");
        }
    }
}
