//! Numbers of xl.cfg(5), section SYNTAX: decimal, octal with a leading 0, hexadecimal with a leading 0x.

/// Why a text is no number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NumberError {
    #[error(
        "is not a number: write it in decimal, in octal with a leading 0 or in hexadecimal with a leading 0x"
    )]
    Invalid,
    #[error("does not fit into 64 bits")]
    Overflow,
}

/// Reads a whole text as a number. A sign is allowed, as a quoted number may have one.
pub fn parse_number(text: &str) -> Result<i64, NumberError> {
    let text = text.trim_start_matches([' ', '\t']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (radix, digits) = if let Some(hex) = digits.strip_prefix("0x").or(digits.strip_prefix("0X"))
    {
        (16, hex)
    } else if digits.len() > 1 && digits.starts_with('0') {
        (8, &digits[1..])
    } else {
        (10, digits)
    };
    // from_str_radix would take a second sign.
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        return Err(NumberError::Invalid);
    }
    let magnitude = i128::from_str_radix(digits, radix).map_err(|_| NumberError::Overflow)?;
    let value = if negative { -magnitude } else { magnitude };
    i64::try_from(value).map_err(|_| NumberError::Overflow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_number_forms_follow_strtol_base_0() {
        let cases: &[(&str, Result<i64, NumberError>)] = &[
            ("0", Ok(0)),
            ("10", Ok(10)),
            ("010", Ok(8)),
            ("0x10", Ok(16)),
            ("0XfF", Ok(255)),
            ("-7", Ok(-7)),
            ("+7", Ok(7)),
            (" 7", Ok(7)),
            ("00", Ok(0)),
            ("9223372036854775807", Ok(i64::MAX)),
            ("-9223372036854775808", Ok(i64::MIN)),
            ("9223372036854775808", Err(NumberError::Overflow)),
            (
                "0xffffffffffffffffffffffffffffffffffffffffff",
                Err(NumberError::Overflow),
            ),
            ("", Err(NumberError::Invalid)),
            ("08", Err(NumberError::Invalid)),
            ("0x", Err(NumberError::Invalid)),
            ("1f", Err(NumberError::Invalid)),
            ("128M", Err(NumberError::Invalid)),
            ("--1", Err(NumberError::Invalid)),
            ("-+1", Err(NumberError::Invalid)),
            ("7 ", Err(NumberError::Invalid)),
            ("true", Err(NumberError::Invalid)),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_number(text), *expected, "{text:?}");
        }
    }
}
