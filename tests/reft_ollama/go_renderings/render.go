// Renders cases, [{"template": ..., "values": ...}], from standard input with Go's own text/template, set up as Ollama
// sets it up, and writes the texts as a JSON list: go run render.go < cases.json
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role, Content string
}

type values struct {
	System, Prompt    string
	Messages          []*message
	Think, IsThinkSet bool
}

func main() {
	var cases []struct {
		Template string
		Values   values
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, c := range cases {
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		fields := map[string]any{
			"System": c.Values.System, "Prompt": c.Values.Prompt, "Messages": c.Values.Messages,
			"Think": c.Values.Think, "IsThinkSet": c.Values.IsThinkSet, "Response": "",
		}
		var text strings.Builder
		if err := parsed.Execute(&text, fields); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(texts); err != nil {
		panic(err)
	}
}
