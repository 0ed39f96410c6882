// Go's own client and forms. Arguments: address, picture. The parts have no file name (CreatePart), or one; the form
// comes as a whole, and in chunks from a pipe, as large ones do.
package main

import (
	"bytes"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"os"
)

func write(form *multipart.Writer, picture []byte, named bool) {
	var part io.Writer
	if named {
		part, _ = form.CreateFormFile("image", "Päckchen \"1\".jpg")
	} else {
		header := textproto.MIMEHeader{}
		header.Set("Content-Disposition", `form-data; name="image"`)
		header.Set("Content-Type", "image/jpeg")
		part, _ = form.CreatePart(header)
	}
	part.Write(picture)
	form.WriteField("metadata", `{"parcel": "7"}`)
	form.Close()
}

func main() {
	address := os.Args[1]
	picture, err := os.ReadFile(os.Args[2])
	if err != nil {
		panic(err)
	}
	for _, named := range []bool{false, true} {
		for _, chunked := range []bool{false, true} {
			var body io.Reader
			var form *multipart.Writer
			if chunked {
				reader, writer := io.Pipe()
				form = multipart.NewWriter(writer)
				go func() {
					write(form, picture, named)
					writer.Close()
				}()
				body = reader
			} else {
				whole := &bytes.Buffer{}
				form = multipart.NewWriter(whole)
				write(form, picture, named)
				body = whole
			}
			answer, err := http.Post(address, form.FormDataContentType(), body)
			if err != nil {
				panic(err)
			}
			text, _ := io.ReadAll(answer.Body)
			answer.Body.Close()
			fmt.Println(answer.StatusCode, answer.Proto, string(text))
		}
	}
}
