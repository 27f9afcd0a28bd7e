//! MAC addresses for devices whose configuration names none.

use rustix::rand::GetRandomFlags;

/// Xen's part of the MAC address space.
pub const MAC_PREFIX: [u8; 3] = [0x00, 0x16, 0x3e];

/// A MAC address of Xen's part, by chance; its fourth byte is below 128, as those that Xen's tools make.
pub fn random_mac() -> [u8; 6] {
    let mut random = [0; 3];
    let mut got = 0;
    while got < random.len() {
        // Fails only where it is interrupted.
        got += rustix::rand::getrandom(&mut random[got..], GetRandomFlags::empty()).unwrap_or(0);
    }
    let [a, b, c] = MAC_PREFIX;
    [a, b, c, random[0] & 0x7f, random[1], random[2]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_mac_lies_in_xens_part_and_differs() {
        let (a, b) = (random_mac(), random_mac());
        assert_eq!(a[..3], MAC_PREFIX);
        assert!(a[3] < 128 && a != b);
    }
}
